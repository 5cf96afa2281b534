"""Networks that the module builds in its own ``setup`` or in ``configure_model``, with all three callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.networks import SmallNet
from helpers.networks import trainer as run
from helpers.vits import VitData, VitModule, quiet
from lightning_quant import AccuQuant, GradientQuantization, IGQViT
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.errors import QuantizationError, UnsupportedModelError
from lightning_quant.nn.structure import is_quantized

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
HOOKS = ["setup", "configure_model"]


def late(base: type[Any], name: str, hook: str, again: bool = False) -> Any:
    """A module of ``base`` whose network ``name`` is built in a hook."""

    def build(self: Any, stage: str | None = None) -> None:
        if getattr(self, name) is None or again:
            setattr(self, name, self.kept.pop())

    def init(self: Any) -> None:
        base.__init__(self)
        # In a list a module is not registered.
        self.kept = [getattr(self, name), getattr(base(), name)]
        setattr(self, name, None)

    return type("Late", (base,), {"__init__": init, hook: build})()


class Small(SmallNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = is_quantized(self)
        return super().training_step(batch, batch_idx)


class Diffusion(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DDIMScheduler()
        blocks: dict[str, Any] = {
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
            "block_out_channels": (8, 16),
        }
        sizes: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
        self.unet: Any = UNet2DModel(add_attention=False, **sizes, **blocks)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        sample: Tensor = self.unet(batch, 10).sample
        return sample


def igq(**kwargs: Any) -> IGQViT:
    return IGQViT(8, 8, groups=2, calibration_images=8, allocate=False, **kwargs)


@pytest.mark.parametrize("hook", HOOKS)
def test_what_trains_is_quantized(hook: str) -> None:
    module, ours = late(Small, "net", hook), GradientQuantization()
    run(ours, max_steps=2).fit(module)
    assert module.seen
    layer = module.net[3]
    assert layer.weight_quantizer.ready
    assert any(layer.weight is p for o in module.trainer.optimizers for g in o.param_groups for p in g["params"])
    assert "setup" not in vars(module)
    run(ours).test(module, verbose=False)


def test_a_head_that_is_built_later_is_the_last_layer() -> None:
    class Head(Small):
        def __init__(self) -> None:
            super().__init__()
            self.head: Any = None

        def setup(self, stage: str) -> None:
            if self.head is None:
                self.head = nn.Linear(3, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.net(images))
            return logits

    module = Head()
    run(GradientQuantization(), max_steps=1).fit(module)
    quantized = [name for name, child in module.named_modules() if getattr(child, "weight_quantizer", None) is not None]
    assert quantized == ["net.3", "net.8", "net.10"]


def test_a_setup_that_builds_nothing_leaves_copies_of_the_quantized_network() -> None:
    class Looks(Small):
        def setup(self, stage: str) -> None:
            self.looked = True

    module, averaging = Looks(), WeightAveraging(use_buffers=True)
    run(GradientQuantization(), averaging, max_steps=3).fit(module)
    assert module.net[3].weight_quantizer.range.isfinite()  # type: ignore[operator,union-attr]
    assert averaging._average_model is not None
    assert is_quantized(averaging._average_model)


def test_what_another_callback_freezes_after_the_exchange_stays_quantized() -> None:
    class Freezes(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            pl_module.net[3].requires_grad_(False)

    class Looks(Small):
        def setup(self, stage: str) -> None:
            pass

    module = Looks()
    run(GradientQuantization(), Freezes(), max_steps=1).fit(module)
    assert is_quantized(module.net[3])


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_builds_the_network_anew_is_quantized_or_refused(hook: str) -> None:
    module = late(Small, "net", hook, again=True)
    if hook == "setup":
        run(GradientQuantization(), max_steps=1).fit(module)
        assert module.seen
        return
    with pytest.raises(QuantizationError, match=r"quantized layers are no longer in Late, .* build it only where"):
        run(GradientQuantization(), max_steps=1).fit(module)


def test_without_layers_it_is_said_when_nothing_more_comes() -> None:
    class Empty(Small):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Identity()  # type: ignore[assignment]

        def setup(self, stage: str) -> None:
            pass

    with pytest.raises(UnsupportedModelError, match="if setup or configure_model creates them, call it first"):
        GradientQuantization().plan(Empty())
    with pytest.raises(UnsupportedModelError, match="has no Conv and no Linear"):
        run(GradientQuantization()).fit(Empty())


@pytest.mark.parametrize("hook", HOOKS)
def test_a_transformer_is_calibrated(hook: str, tmp_path: Path) -> None:
    module = late(VitModule, "backbone", hook)
    quiet(tmp_path, igq()).test(module, VitData(), verbose=False)
    assert is_calibrated(module)


@pytest.mark.parametrize("hook", HOOKS)
def test_checkpoints_are_loaded_into_what_is_built_then(hook: str, tmp_path: Path) -> None:
    first = late(VitModule, "backbone", hook)
    trainer = quiet(tmp_path, igq())
    trainer.fit(first, VitData())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    trainer.test(first, VitData(), verbose=False)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    expected = torch.cat(first.seen[-2:])
    for name in ("float.ckpt", "quantized.ckpt"):
        again = late(VitModule, "backbone", hook)
        with torch.no_grad():
            [kept.head.weight.zero_() for kept in again.kept]
        trainer = quiet(tmp_path / name.removesuffix(".ckpt"), igq())
        trainer.test(again, VitData(), ckpt_path=tmp_path / name, verbose=False)
        assert torch.equal(torch.cat(again.seen), expected)


def test_a_network_that_is_missing_still_is_told_so(tmp_path: Path) -> None:
    module = late(VitModule, "backbone", "setup")
    module.kept = [nn.Identity()]
    with pytest.raises(UnsupportedModelError, match="Late has no attention"):
        quiet(tmp_path, igq()).test(module, VitData(), verbose=False)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_denoiser_is_calibrated(hook: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"steps": 2, "window": 1, "updates": 1, "batch_size": 2, "trajectories": 2, "held_out": 2}
    module = late(Diffusion, "unet", hook)
    quiet(tmp_path, AccuQuant(8, 8, denoiser="unet", **sizes)).predict(module, DataLoader(torch.randn(2, 3, 8, 8)))  # type: ignore[arg-type]
    assert is_calibrated(module)
