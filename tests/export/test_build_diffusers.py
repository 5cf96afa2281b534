"""Denoisers of diffusers are made again from their class and config."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from helpers.artifacts import quantized
from helpers.diffusion import tiny_autoencoder, tiny_condition_unet, tiny_dit, tiny_inputs, tiny_unet, tiny_vqmodel
from lightning_quant import load_quantized, save_quantized
from lightning_quant.export.build import deduce, mismatch

NETWORKS: dict[str, Any] = {
    "unet": tiny_unet,
    "unet, classes": lambda: tiny_unet(num_class_embeds=4),
    "unet, oblong": lambda: tiny_unet(sample_size=(8, 16)),
    "unet, no shape tells": lambda: tiny_unet(norm_eps=1e-3, act_fn="gelu", freq_shift=1, downsample_padding=0),
    "condition unet": tiny_condition_unet,
    "dit": tiny_dit,
    "autoencoder": tiny_autoencoder,
    "vq": tiny_vqmodel,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_class_and_config_are_found(name: str) -> None:
    model = quantized(NETWORKS[name]())
    build = deduce(model)
    assert build is not None
    assert build["class_path"] == f"diffusers.{type(model).__name__}"
    assert not mismatch(model, build, settings=True)


def test_the_network_comes_back_alone_after_reading_it_from_a_folder(tmp_path: Any) -> None:
    tiny_dit().save_pretrained(tmp_path / "float")
    model: Any = quantized(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "float"))
    loaded: Any = load_quantized(save_quantized(model, tmp_path / "quantized"))
    x, conditioning = tiny_inputs(model)
    call: dict[str, Any] = {"timestep": torch.tensor([3, 900]), "class_labels": conditioning["class_labels"]}
    with torch.no_grad():
        assert torch.equal(loaded(x, **call).sample, model(x, **call).sample)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }


def test_a_network_that_was_changed_after_it_was_made_is_not_taken_for_its_config() -> None:
    model = tiny_unet()
    model.conv_out = nn.Conv2d(16, 3, 1)
    assert deduce(quantized(model)) is None


class Own(ModelMixin, ConfigMixin):  # type: ignore[misc]
    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


def test_a_class_of_ones_own_has_its_full_path() -> None:
    build = deduce(quantized(Own(width=6)))
    assert build == {"class_path": f"{__name__}.Own", "init_args": {"width": 6}}
