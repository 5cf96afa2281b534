"""Networks parts of which are constant on the calibration images: every range is definite, and outputs survive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from helpers.vits import calibration, evaluate, finished, images, swin, vit
from lightning_quant import load_quantized, save_quantized, strip
from lightning_quant.errors import CheckpointError, QuantizationError
from lightning_quant.igq_vit.settings import Scheme
from lightning_quant.nn.structure import quantizers_of, rebuild
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer


def fill(weight: float, bias: float, *names: str) -> Callable[[nn.Module], None]:
    """Constant parameters of some modules."""

    def apply(network: nn.Module) -> None:
        for name in names:
            module: Any = network.get_submodule(name)
            module.weight.fill_(weight)
            module.bias.fill_(bias)

    return torch.no_grad()(apply)


@torch.no_grad()
def every_other_channel(network: nn.Module) -> None:
    norm: Any = network.get_submodule("blocks.0.norm1")
    norm.weight[::2], norm.bias[::2] = 0.0, 2.0


@torch.no_grad()
def few_kinds_of_channels(network: nn.Module) -> None:
    layer: Any = network.get_submodule("blocks.0.mlp.fc1")
    layer.weight[2:], layer.bias[2:] = layer.weight[0].clone(), layer.bias[0].clone()


@torch.no_grad()
def weight_rows(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.weight[0], layer.weight[1], layer.weight[2] = 0.0, 0.3, -3e3


@torch.no_grad()
def query_and_key(network: nn.Module) -> None:
    """Softmax rows that only the position decides: few different maxima."""
    for name, layer in network.named_modules():
        if name.endswith("attn.qkv"):
            half = 2 * len(layer.weight) // 3  # type: ignore[arg-type]
            layer.weight[:half], layer.bias[:half] = 0.0, 0.0  # type: ignore[index,operator]
        if name.endswith("attn"):
            layer.relative_position_bias_table.normal_()  # type: ignore[operator,union-attr]


DEAD: dict[str, Callable[[nn.Module], None]] = {
    "norm of 0": fill(0.0, 0.0, "blocks.0.norm1"),
    "norm of -3": fill(0.0, -3.0, "blocks.0.norm2"),
    "Q, K, V of 0": fill(0.0, 0.0, "blocks.0.attn.qkv"),
    "Q, K, V of 1": fill(0.0, 1.0, "blocks.0.attn.qkv"),
    "all of a block": fill(
        0.0, 0.0, *(f"blocks.0.{n}" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1"))
    ),
    "every other channel": every_other_channel,
    "few kinds of channels": few_kinds_of_channels,
    "weight rows": weight_rows,
}


def dead(kind: str) -> tuple[nn.Module, Tensor]:
    """A network and its calibration images; there are few kinds of channels where all images are the same."""
    network = vit()
    DEAD[kind](network)
    return network, images(1).expand(8, -1, -1, -1) if kind == "few kinds of channels" else images(8)


def flat(network: nn.Module) -> list[Tensor]:
    return [b.flatten() for _, q in quantizers_of(network) for b in q.buffers() if b.is_floating_point()]


CASES = [("igq", kind) for kind in DEAD]
CASES += [(scheme, kind) for scheme in get_args(Scheme) for kind in ("all of a block", "every other channel")]


@pytest.mark.parametrize(("scheme", "kind"), sorted({*CASES}))
def test_ranges_are_definite_and_loaded_outputs_the_same_bits(scheme: Scheme, kind: str, tmp_path: Path) -> None:
    network, x = dead(kind)
    before = evaluate(network, x)
    finished(calibration(network, x, allocate=False, scheme=scheme, weight_bits=8, activation_bits=8))
    assert torch.cat(flat(network)).isfinite().all()
    assert all(quantizer.ready for _, quantizer in quantizers_of(network))
    after = evaluate(network, x)
    assert (after - before).norm() < 0.1 * before.norm()
    others, expected = images(5, seed=3), evaluate(network, images(5, seed=3))
    loaded = vit()
    rebuild(loaded, network.state_dict())
    loaded.load_state_dict(network.state_dict())
    save_quantized(network, tmp_path / "saved")
    for again in (loaded, copy.deepcopy(network), load_quantized(tmp_path / "saved", model=vit())):
        assert torch.equal(evaluate(again, others), expected)
        assert torch.equal(again.train()(others).detach(), expected)
    if scheme != "repq":  # which changes weights
        strip(network)
        assert torch.equal(evaluate(network, x), before)


def test_rows_of_few_kinds_are_loaded_with_the_same_bits() -> None:
    network, x = swin(), images(4, 16, 3)
    query_and_key(network)
    finished(calibration(network, x, allocate=False, groups=12, softmax_groups=24))
    assert torch.cat(flat(network)).isfinite().all()
    loaded = swin()
    rebuild(loaded, network.state_dict())
    loaded.load_state_dict(network.state_dict())
    assert torch.equal(evaluate(loaded, x), evaluate(network, x))


def test_groups_are_allocated_among_dead_tensors() -> None:
    network, x = dead("all of a block")
    finished(calibration(network, x, groups=2, weight_bits=8, activation_bits=8))
    assert torch.cat(flat(network)).isfinite().all()


def test_a_range_that_is_not_finite_is_told_with_its_layer() -> None:
    network, x = vit(), images(4)
    found = calibration(network, x, allocate=False)
    with torch.no_grad():
        network.head.weight[3, 0] = float("nan")  # type: ignore[union-attr,index,operator]
    with pytest.raises(QuantizationError, match=r"head.weight_quantizer.scale is NaN .* exclude=\['head'\]"):
        found.step()


@pytest.mark.parametrize("quantizer", [GroupQuantizer(4, 3), RowGroupQuantizer(4, 3)])
def test_empty_groups_of_older_states_take_their_centre(quantizer: Any) -> None:
    ends = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 9.0]])
    quantizer.set_ranges(ends if isinstance(quantizer, GroupQuantizer) else ends[:, 1])
    expected = quantizer.scale.clone()
    state = {key: value.clone() for key, value in quantizer.state_dict().items()}
    state["scale"][1] = float("nan")
    if "zero_point" in state:
        state["zero_point"][1] = float("nan")
    again = type(quantizer)(4, 3)
    again.load_state_dict(state)
    assert again.ready
    assert torch.equal(again.scale, expected)


def test_a_part_of_a_range_is_refused() -> None:
    network, x = vit(), images(4)
    finished(calibration(network, x, allocate=False))
    state = network.state_dict()
    state["head.weight_quantizer.scale"][2] = float("nan")
    with pytest.raises(CheckpointError, match=r"head.weight_quantizer.scale: 1 of 10 numbers are NaN"):
        network.load_state_dict(state)


@pytest.mark.parametrize("make", [GroupQuantizer, RowGroupQuantizer])
def test_without_a_calibration_a_batch_gives_no_range(make: Any) -> None:
    quantizer: Quantizer = make(4, 2)
    with pytest.raises(QuantizationError, match="has no range, and it cannot be set from a single batch"):
        quantizer.initialize(torch.ones(2, 3, 4))
