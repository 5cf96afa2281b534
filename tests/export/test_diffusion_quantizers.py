"""Denoisers whose weights have learned codes, and whose ranges depend on the timestep, come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.networks import trainer
from helpers.ranged import TIMESTEPS, call, network_of, ranged
from lightning_quant import load_from_checkpoint, load_quantized, save_quantized
from lightning_quant.accuquant.ranges import activation_quantizers
from lightning_quant.errors import QuantizationError
from lightning_quant.functional.packing import packed_size, unpack_bits
from lightning_quant.nn import swap
from lightning_quant.nn.structure import quantized_layers
from lightning_quant.quantizers import FixedQuantizer, RoundedQuantizer, TimestepQuantizer

STARTS = (999, 600, 200)


def move(quantizer: Any, leaves: dict[str, Tensor], seed: int) -> None:
    """Learn at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.add_(0.3 * torch.randn(leaf.shape, generator=generator))
    quantizer.end()


def learned(kind: Any = "flat", starts: tuple[int, ...] = (), **settings: Any) -> Any:
    """A calibrated denoiser: few of its codes are the nearest, no two ranges are the same."""
    network = ranged(kind, starts, **settings)
    for seed, (_, layer) in enumerate(quantized_layers(network)):
        quantizer: Any = layer.weight_quantizer
        move(quantizer, quantizer.begin(layer.weight), seed)
    for seed, quantizer in enumerate(activation_quantizers(network).values()):
        move(quantizer, quantizer.begin(), seed)
    return network


def outputs(network: nn.Module, timesteps: Any = TIMESTEPS) -> Tensor:
    with torch.no_grad():
        return torch.stack([call(network, t) for t in timesteps])


def nearest(layer: Any) -> Tensor:
    quantizer = FixedQuantizer(layer.weight_quantizer.bits, symmetric=False, axis=0)
    quantizer.scale, quantizer.zero_point = layer.weight_quantizer.scale, layer.weight_quantizer.zero_point
    quantizer.ready = True
    moved: Tensor = quantizer(layer.weight)
    return moved


def codes_of(network: nn.Module) -> dict[str, Tensor]:
    found = ((name, layer.weight_quantizer) for name, layer in quantized_layers(network))
    return {name: quantizer.codes for name, quantizer in found if isinstance(quantizer, RoundedQuantizer)}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


class Shared(nn.Module):
    """One convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(x))
        return output


def test_a_layer_under_two_names_comes_back(tmp_path: Path) -> None:
    network, x = Shared().eval(), torch.ones(1, 2, 4, 4)
    layer: Any = network.first
    quantizer = RoundedQuantizer(3)
    quantizer.initialize(layer.weight)
    swap(layer, weight_quantizer=quantizer)
    move(quantizer, quantizer.begin(layer.weight), seed=0)
    loaded = load_quantized(save_quantized(network, tmp_path / "saved"), model=Shared())
    assert loaded.first is loaded.second
    assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("kind", ["ddpm", "sd", "dit"])
@pytest.mark.parametrize("starts", [(), STARTS])
def test_a_denoiser_comes_back_with_the_same_outputs(tmp_path: Path, kind: Any, starts: tuple[int, ...]) -> None:
    network = learned(kind, starts)
    loaded = load_quantized(save_quantized(network, tmp_path / "denoiser"), model=network_of(kind))
    assert torch.equal(outputs(loaded), outputs(network))
    ours, theirs = activation_quantizers(network), activation_quantizers(loaded)
    assert ours.keys() == theirs.keys()
    for key, quantizer in ours.items():
        other = theirs[key]
        assert (other.starts, other.parts, other.bits) == (quantizer.starts, quantizer.parts, quantizer.bits)
        assert torch.equal(other.scale, quantizer.scale)
        assert torch.equal(other.zero_point, quantizer.zero_point)


def test_the_codes_that_are_stored_are_those_that_were_learned(tmp_path: Path) -> None:
    network = learned()
    folder = save_quantized(network, tmp_path / "denoiser")
    stored = load_file(folder / "model.safetensors")
    loaded = load_quantized(folder, model=network_of("flat"))
    for name, layer in quantized_layers(network):
        quantizer: Any = layer.weight_quantizer
        count = layer.weight.numel()
        packed = stored[f"{name}.weight"]
        assert (packed.dtype, packed.numel()) == (torch.uint8, packed_size(count, quantizer.bits))
        assert torch.equal(unpack_bits(packed, quantizer.bits, count).view(layer.weight.shape), quantizer.codes.int())
        assert not torch.equal(quantizer(layer.weight), nearest(layer)), "codes that are the nearest show nothing"
        other: Any = loaded.get_submodule(name)
        assert isinstance(other.weight_quantizer, RoundedQuantizer)
        assert torch.equal(other.weight_quantizer.codes, quantizer.codes)
        assert other.weight_quantizer.codes.dtype == quantizer.codes.dtype
        assert torch.equal(other.weight, quantizer(layer.weight))
    assert not [name for name in stored if name.endswith("codes")]


def test_what_is_loaded_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    save_quantized(learned(starts=STARTS), once)
    save_quantized(load_quantized(once, model=network_of("flat")), twice)
    for name in ("model.safetensors", "quantization.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()


def test_saving_changes_nothing(tmp_path: Path) -> None:
    network = learned(starts=STARTS)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = outputs(network)
    save_quantized(network, tmp_path / "denoiser")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(outputs(network), expected)


def test_what_is_loaded_is_told_the_timestep_by_each_way_of_calling_it(tmp_path: Path) -> None:
    network = learned(starts=STARTS)
    loaded: Any = load_quantized(save_quantized(network, tmp_path / "denoiser"), model=network_of("flat"))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = {t: network(x, t).sample for t in (999, 600, 100)}
        for t, output in expected.items():
            assert torch.equal(loaded(sample=x, timestep=torch.tensor(t)).sample, output)
        mixed = torch.tensor([999, 100])
        assert torch.equal(loaded(x, mixed).sample, network(x, mixed).sample)
    assert not torch.equal(expected[999], expected[100])


def test_it_takes_the_bits_that_it_says(tmp_path: Path) -> None:
    network = learned("ddpm", weight_bits=4)
    folder = save_quantized(network, tmp_path / "denoiser")
    content = json.loads((folder / "quantization.json").read_text())
    floats = sum(parameter.numel() for parameter in network.parameters()) * 4
    layers: list[tuple[str, Any]] = list(quantized_layers(network))
    packed = sum(packed_size(layer.weight.numel(), layer.weight_quantizer.bits) for _, layer in layers)
    stored = load_file(folder / "model.safetensors")
    weights = [f"{name}.weight" for name, _ in layers]
    assert content["float32_bytes"] == floats
    assert sum(stored[name].numel() for name in weights) == packed < 0.14 * floats


@pytest.mark.parametrize("bits", [2, 3, 8, 9, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_bit_width(tmp_path: Path, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    model, plain = (nn.Sequential(nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 2)).to(dtype) for _ in range(2))
    layer: Any = model[0]
    quantizer = RoundedQuantizer(bits, symmetric)
    quantizer.initialize(layer.weight)
    swap(layer, TimestepQuantizer(8), quantizer)
    layer.input_quantizer.initialize(torch.randn(4, 9))
    move(quantizer, quantizer.begin(layer.weight), 0)
    loaded: Any = load_quantized(save_quantized(model.eval(), tmp_path / "mlp"), model=plain)
    x = torch.randn(4, 9).to(dtype)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded[0].weight_quantizer.codes, quantizer.codes)
    assert load_file(tmp_path / "mlp" / "model.safetensors")["0.weight"].numel() == packed_size(63, bits)


def test_a_weight_that_another_layer_needs_in_float_is_kept_beside_its_codes(tmp_path: Path) -> None:
    def tied() -> Any:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        return model.eval()

    model = tied()
    quantizer = RoundedQuantizer(4)
    quantizer.initialize(model[0].weight)
    move(quantizer, quantizer.begin(model[0].weight), 0)
    swap(model[0], None, quantizer)
    loaded = load_quantized(save_quantized(model, tmp_path / "tied"), model=tied())
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(stored["0.weight"], model[0].weight)
    assert torch.equal(stored["0.weight_quantizer.codes"], quantizer.codes)


@pytest.mark.parametrize("which", ["weights", "activations"])
def test_what_still_learns_is_not_saved(tmp_path: Path, which: str) -> None:
    network = learned()
    if which == "weights":
        network.conv_in.weight_quantizer.begin(network.conv_in.weight)
    else:
        network.conv_in.input_quantizer.begin()
    slot = "weight" if which == "weights" else "input"
    with pytest.raises(
        QuantizationError, match=rf"1 quantizers .* still learn, for example conv_in\.{slot}_quantizer: let"
    ):
        save_quantized(network, tmp_path / "denoiser")
    assert not (tmp_path / "denoiser").exists()


class Module(pl.LightningModule):
    """Of somebody who knows nothing of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = network_of("flat")


def checkpoint(module: pl.LightningModule, path: Path) -> Path:
    own = trainer()
    own.strategy.connect(module)
    own.save_checkpoint(path)
    return path


@pytest.mark.parametrize("starts", [(), STARTS])
def test_a_checkpoint_comes_back_with_the_same_outputs(tmp_path: Path, starts: tuple[int, ...]) -> None:
    module = Module()
    module.unet = learned(starts=starts)
    loaded: Any = load_from_checkpoint(Module, checkpoint(module, tmp_path / "last.ckpt")).eval()
    assert torch.equal(outputs(loaded.unet), outputs(module.unet))
    assert equal(codes_of(loaded.unet), codes_of(module.unet))
    # Unlike a folder, a checkpoint keeps the float weights.
    assert equal(dict(loaded.unet.named_parameters()), dict(module.unet.named_parameters()))


def test_learning_goes_on_from_what_was_loaded(tmp_path: Path) -> None:
    module = Module()
    module.unet = learned()
    loaded: Any = load_from_checkpoint(Module, checkpoint(module, tmp_path / "last.ckpt")).eval()
    before = outputs(loaded.unet)
    for _, layer in quantized_layers(loaded.unet):
        quantizer: Any = layer.weight_quantizer
        quantizer.begin(layer.weight)
        quantizer.end()
    assert equal(codes_of(loaded.unet), codes_of(module.unet))
    torch.testing.assert_close(outputs(loaded.unet), before, rtol=0.05, atol=0.02)
