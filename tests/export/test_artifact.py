"""A folder holds all of a quantized model, and nothing that was changed is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.artifacts import mlp, quantized, weights
from helpers.networks import SmallNet, fitted, quantization
from lightning_quant import ImageClassifier, load_quantized, save_quantized
from lightning_quant.nn import swap, swap_attention
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.quantizers.dynamic import TokenQuantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer


def grouped(bits: int = 6, groups: int = 4) -> GroupQuantizer:
    quantizer = GroupQuantizer(bits, groups)
    quantizer.set_ranges(torch.linspace(-3, 3, 2 * groups).view(groups, 2))
    return quantizer


def rows(bits: int = 6) -> RowGroupQuantizer:
    quantizer = RowGroupQuantizer(bits, 2)
    quantizer.set_ranges(torch.tensor([0.3, 1.0]))
    return quantizer


def vit(**kwargs: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **({"img_size": 32, "depth": 2, "num_classes": 5} | kwargs))


def igq_vit() -> nn.Module:
    model = vit()
    for block in model.blocks:  # type: ignore[union-attr]
        swap_attention(block.attn, softmax_quantizer=rows())
        for layer in (block.attn.qkv, block.mlp.fc2):
            swap(layer, grouped(), weights(layer))
    return model.eval()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_vision_transformer_comes_back_alone_with_the_same_outputs(tmp_path: Path) -> None:
    model = igq_vit()
    state = torch.random.get_rng_state()
    loaded = load_quantized(save_quantized(model, tmp_path / "deep" / "vit"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training
    assert torch.equal(loaded(images()), model(images()))
    assert {name: repr(q) for name, q in quantizers_of(loaded)} == {name: repr(q) for name, q in quantizers_of(model)}


def test_a_weight_that_derives_from_others_comes_back_with_the_same_outputs(tmp_path: Path) -> None:
    class Own(nn.Linear):
        pass

    def network() -> nn.Sequential:
        return nn.Sequential(Own(9, 7), nn.utils.parametrizations.weight_norm(nn.Linear(7, 5)))

    model, x = quantized(network()), torch.randn(3, 9)
    loaded = load_quantized(save_quantized(model, tmp_path / "norm"), model=network())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = igq_vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_quantized(model, tmp_path / "vit")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_loaded_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    save_quantized(igq_vit(), once)
    save_quantized(load_quantized(once), twice)
    for name in ("model.safetensors", "quantization.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_bit_width_in_the_fewest_bytes(tmp_path: Path, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    model, plain = mlp().to(dtype), mlp()
    layer = model[0]
    swap(layer, None, weights(layer, bits, symmetric))
    loaded = load_quantized(save_quantized(model, tmp_path / "mlp"), model=plain)
    x = torch.randn(4, 9).to(dtype)
    assert torch.equal(loaded(x), model(x))
    stored = load_file(tmp_path / "mlp" / "model.safetensors")["0.weight"]
    assert (stored.dtype, stored.numel()) == (torch.uint8, -(-63 * bits // 8))


def test_a_one_signed_channel_whose_zero_lies_outside_the_codes_is_kept(tmp_path: Path) -> None:
    model, plain = mlp(), mlp()
    layer = model[0]
    with torch.no_grad():
        layer.weight[2] = torch.linspace(2, 3, 9)  # type: ignore[operator]
    quantizer = weights(layer)
    quantizer.scale[2], quantizer.zero_point[2] = 1 / 15, -30
    swap(layer, None, quantizer)
    loaded = load_quantized(save_quantized(model, tmp_path / "mlp"), model=plain)
    x = torch.randn(4, 9)
    assert torch.equal(loaded(x), model(x))
    assert load_file(tmp_path / "mlp" / "model.safetensors")["0.weight"].dtype == torch.uint8
    assert torch.equal(loaded.get_submodule("0").weight, quantizer(layer.weight))  # type: ignore[arg-type]


def test_a_weight_that_codes_cannot_stand_for_is_kept_as_it_is(tmp_path: Path) -> None:
    model, plain = mlp().bfloat16(), mlp()
    layer = model[0]
    quantizer = weights(layer)
    # BF16 rounds the value of code 0, 12.3, to 12.3125, whose code is 1.
    quantizer.scale[0], quantizer.zero_point[0] = 0.0123, -1000
    swap(layer, None, quantizer)
    loaded = load_quantized(save_quantized(model, tmp_path / "mlp"), model=plain)
    x = torch.randn(4, 9).bfloat16()
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.get_submodule("0").weight, layer.weight)  # type: ignore[arg-type]


def test_a_trained_network_comes_back_with_ranges_and_intervals(tmp_path: Path) -> None:
    model = fitted(quantization(first_and_last="8bit")).eval()
    loaded = load_quantized(save_quantized(model, tmp_path / "int4"))
    x = torch.randn(4, 3, 8, 8)
    assert type(loaded) is SmallNet
    assert torch.equal(loaded(x), model(x))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items() if "quantizer" in k)
    assert load_file(tmp_path / "int4" / "model.safetensors")["net.3.weight"].numel() == 8 * 8 * 9 // 2


def test_the_packages_classifier_comes_back_alone(tmp_path: Path) -> None:
    model = ImageClassifier("cifar_resnet20", num_classes=3, model_kwargs={"in_chans": 1}, channels_last=True)
    quantized(model)
    loaded = load_quantized(save_quantized(model, tmp_path / "classifier"))
    x = torch.randn(2, 1, 8, 8)
    assert type(loaded) is ImageClassifier
    assert torch.equal(loaded(x), model(x))


class Tied(nn.Module):
    """Two names of one weight: within one layer's two names, and in a float layer beside a quantized one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(self.again(self.twice(x))))
        return result


def test_tied_tensors_are_stored_once_and_codes_only_where_nobody_needs_the_float_weight(tmp_path: Path) -> None:
    model = Tied().eval()
    swap(model.twice, None, weights(model.twice))
    swap(model.first, None, weights(model.first))
    loaded = load_quantized(save_quantized(model, tmp_path / "tied"), model=Tied())
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    assert {name for name in stored if name.endswith("weight")} == {"twice.weight", "first.weight"}
    assert (stored["twice.weight"].dtype, stored["first.weight"].dtype) == (torch.uint8, torch.float32)
    assert not [name for name in stored if name.startswith("again")]


def test_an_attention_that_was_opened_and_left_in_float_is_open_again(tmp_path: Path) -> None:
    model = vit()
    swap_attention(model.get_submodule("blocks.0.attn"))
    swap(model.get_submodule("head"), TokenQuantizer(4), None)
    loaded = load_quantized(save_quantized(model.eval(), tmp_path / "vit"))
    assert type(loaded.get_submodule("blocks.0.attn")) is type(model.get_submodule("blocks.0.attn"))
    assert torch.equal(loaded(images()), model(images()))


def test_four_bits_take_at_most_sixteen_hundredths_of_fp32(tmp_path: Path) -> None:
    model = quantized(timm.create_model("vit_small_patch16_224", depth=1, img_size=32, num_classes=10))
    folder = save_quantized(model, tmp_path / "small")
    floats = sum(parameter.numel() for parameter in model.parameters()) * 4
    content = json.loads((folder / "quantization.json").read_text())
    size = (folder / "model.safetensors").stat().st_size
    assert (content["float32_bytes"], content["packed_bytes"]) == (floats, size)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 0.16 * floats


def test_nothing_in_the_folder_is_a_pickle(tmp_path: Path) -> None:
    folder = save_quantized(igq_vit(), tmp_path / "vit")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "quantization.json"}
    assert list(tmp_path.iterdir()) == [folder]
