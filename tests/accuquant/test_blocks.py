"""Blocks: each layer in one, in order of execution; what comes into them and out of them, to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.diffusion import tiny_unet
from helpers.prepared import GUIDANCE, NETWORKS, call, calls_of, prepared
from helpers.processes import on_ranks
from lightning_quant.accuquant.blocks import BlockData, Call, blocks_of, call_with, gather
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.errors import QuantizationError, UnsupportedModelError
from lightning_quant.nn.attention import swapped_attentions
from lightning_quant.nn.structure import in_float, quantized_layers


def first_calls(network: nn.Module, names: list[str], run: Callable[[], object]) -> list[str]:
    """Names of modules in the order in which they are first called."""
    found: list[str] = []
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: found.append(name))  # type: ignore[misc]
        for name in names
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_quantized_layer_is_in_one_block_and_each_open_attention_too(kind: str) -> None:
    denoiser, plan, _ = prepared(kind)
    network, blocks = denoiser.network, blocks_of(denoiser.network, plan)
    layers = Counter(id(layer) for block in blocks for _, layer in quantized_layers(network.get_submodule(block)))
    assert layers == Counter(id(layer) for _, layer in quantized_layers(network))
    attentions = Counter(id(a) for block in blocks for _, a in swapped_attentions(network.get_submodule(block)))
    assert attentions == Counter(id(a) for _, a in swapped_attentions(network))
    assert attentions


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_come_in_order_of_execution_and_the_same_before_and_after(kind: str) -> None:
    denoiser, plan, calls = prepared(kind)
    blocks = blocks_of(denoiser.network, plan)
    assert first_calls(denoiser.network, blocks, calls[0][0]) == blocks
    assert blocks_of(NETWORKS[kind](), plan) == blocks


def test_the_blocks_of_a_unet() -> None:
    denoiser, plan, _ = prepared("unet")
    assert blocks_of(denoiser.network, plan)[:6] == [
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0",
    ]
    assert "mid_block.attentions.0" in blocks_of(denoiser.network, plan)


def test_the_blocks_of_transformers() -> None:
    denoiser, plan, _ = prepared("condition")
    mid = "mid_block.attentions.0"
    found = [name for name in blocks_of(denoiser.network, plan) if name.startswith(mid)]
    assert found == [f"{mid}.proj_in", f"{mid}.transformer_blocks.0", f"{mid}.proj_out"]
    denoiser, plan, _ = prepared("dit")
    found = blocks_of(denoiser.network, plan)
    assert found == ["pos_embed.proj", "transformer_blocks.0", "transformer_blocks.1", "proj_out_1", "proj_out_2"]


def test_what_is_excluded_is_in_no_block() -> None:
    denoiser, plan, _ = prepared("unet", exclude=("mid_block.*",))
    assert not [name for name in blocks_of(denoiser.network, plan) if name.startswith("mid_block")]


def output_of(network: nn.Module, block: str, calls: list[Call]) -> Tensor:
    """What a block returns when the whole network runs."""
    found: list[Tensor] = []
    hook = network.get_submodule(block).register_forward_hook(lambda *args: found.append(args[-1]))
    with torch.no_grad():
        for run, _ in calls:
            run()
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize(
    ("kind", "starts"), [("unet", ()), ("unet", (801, 401)), ("condition", (401, 1)), ("dit", (801, 1))]
)
def test_a_block_alone_does_what_it_does_in_the_network(kind: str, starts: tuple[int, ...]) -> None:
    guidance = None if kind == "unet" else GUIDANCE
    denoiser, plan, calls = prepared(kind, 2, starts, guidance)
    network, untouched = denoiser.network, NETWORKS[kind]()
    float_calls = calls_of(Denoiser(untouched, guidance), [0, 1], 2)
    for block in blocks_of(network, plan)[::2]:
        data = gather(network, block, calls, branches=1 if guidance is None else 2)
        rows = torch.arange(len(data))
        with torch.no_grad():
            output, target = data.run(network.get_submodule(block), rows)
        # Of all timesteps at once, with the range of each.
        torch.testing.assert_close(output, output_of(network, block, calls), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target, output_of(untouched, block, float_calls), rtol=1e-4, atol=1e-5)
        assert not torch.equal(output, target)


def test_inputs_are_of_the_network_that_is_quantized_so_far() -> None:
    denoiser, _, calls = prepared("unet")
    network, block = denoiser.network, "mid_block.resnets.0"
    before = gather(network, block, calls)
    with in_float(network):
        in_full = gather(network, block, calls)
    assert torch.equal(before.targets, in_full.targets)
    assert not torch.equal(before.inputs[0], in_full.inputs[0])
    # What comes later changes nothing.
    network.get_submodule(block).conv1.weight_quantizer.scale.mul_(2)  # type: ignore[union-attr,operator]
    assert torch.equal(gather(network, block, calls).inputs[0], before.inputs[0])
    network.conv_in.weight_quantizer.scale.mul_(2)  # type: ignore[union-attr,operator]
    assert not torch.equal(gather(network, block, calls).inputs[0], before.inputs[0])


def test_the_network_runs_no_further_than_the_block() -> None:
    denoiser, _, calls = prepared("unet")
    network, seen = denoiser.network, Counter[str]()
    for name in ("conv_in", "mid_block.resnets.0", "mid_block.attentions.0", "conv_out"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.update([name]))  # type: ignore[misc]
    gather(network, "mid_block.resnets.0", calls)
    # The hook of the block's own output comes first, and ends the call.
    assert seen == {"conv_in": 2 * len(calls), "mid_block.resnets.0": len(calls)}
    assert hooks_of(network, "mid_block.resnets.0") == 1


def hooks_of(network: nn.Module, name: str) -> int:
    module = network.get_submodule(name)
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


class Odd(nn.Module):
    """A network whose block gets what a row each, one for all rows, and a plain number are."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Inner()

    def forward(self, x: Tensor, t: int, gain: Any = 2, skip: bool = False) -> Tensor:
        found: Tensor = x if skip else self.block(x, torch.full((1, 1), float(t)), gain=gain, nothing=None)
        return found


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, gain: Any, nothing: None) -> tuple[Tensor, str]:
        return self.linear(x) * gain + t, "a remark"


def odd(rows: tuple[int, ...] = (3, 2), **arguments: Any) -> tuple[Odd, list[Call]]:
    network = Odd()
    xs = [torch.randn(n, 4) for n in rows]
    return network, [(partial(network, x, t, **arguments), t) for t, x in enumerate(xs)]


def test_arguments_by_position_and_keyword_are_kept_whole() -> None:
    network, calls = odd()
    data = gather(network, "block", calls)
    assert len(data) == 5
    assert data.timesteps.tolist() == [0, 0, 0, 1, 1]
    assert data.inputs[1].tolist() == [[0.0], [0.0], [0.0], [1.0], [1.0]]
    assert data.constants == {"gain": 2, "nothing": None}
    for rows in (torch.tensor([4, 0]), torch.arange(5)):
        output, target = data.run(network.block, rows)
        torch.testing.assert_close(output, target)
    assert torch.equal(call_with(network.block, {**data.inputs, **data.constants}), output)


def test_calls_that_miss_the_block_or_differ_are_refused() -> None:
    network, calls = odd(skip=True)
    with pytest.raises(UnsupportedModelError, match=r"did not call block.*exclude=\['block'\]"):
        gather(network, "block", calls)
    network, calls = odd()
    calls[1] = (partial(network, torch.randn(2, 4), 1, gain=3), 1)
    with pytest.raises(
        UnsupportedModelError, match=r"'gain' of block is 2 in one call and 3 in another.*reconstruction=0"
    ):
        gather(network, "block", calls)
    assert not hooks_of(network, "block")


def test_a_float_network_that_overflows_is_refused() -> None:
    network, calls = odd(gain=float("inf"))
    with pytest.raises(QuantizationError, match=r"float network's block returns NaN or infinity.*precision='32-true'"):
        gather(network, "block", calls)


def test_an_error_of_the_network_leaves_no_hook_and_all_quantizers() -> None:
    denoiser, _, calls = prepared("unet")
    network = denoiser.network
    names = list(network.state_dict())
    wrong: Call = (partial(call, denoiser, 1, [9]), 1)
    for broken in ([wrong], [calls[0], wrong]):
        with pytest.raises(IndexError):
            gather(network, "conv_out", broken)
    assert list(network.state_dict()) == names
    assert not hooks_of(network, "conv_out")


def test_images_keep_their_branches_together() -> None:
    denoiser, _, calls = prepared("condition", 3, guidance=GUIDANCE)
    data = gather(denoiser.network, "conv_in", calls, branches=2)
    assert data.places.tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11], [12, 15], [13, 16], [14, 17]]
    rows = data.of(torch.tensor([1, 6]))
    assert rows.tolist() == [1, 4, 12, 15]
    # Before conv_in both branches are the same.
    assert torch.equal(data.inputs[0][1], data.inputs[0][4])


def rows_on(rank: int, ranks: int) -> tuple[list[list[float]], int]:
    """Targets of images of all ranks in their order, 0 where another rank has it."""
    denoiser = Denoiser(tiny_unet())
    own = list(range(5))[rank::ranks]
    calls = calls_of(denoiser, own, 5) if own else []
    data = gather(denoiser.network, "conv_in", calls)
    total = torch.zeros(len(data.places))
    for image, (place,) in enumerate(data.places.tolist()):
        if place >= 0:
            total[image] = data.targets[place].sum()
    return total.tolist(), len(data)


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_number_images_as_one_rank_does(ranks: int) -> None:
    """With six ranks the last one has no image."""
    whole, rows = rows_on(0, 1)
    found = on_ranks(ranks, rows_on)
    assert sum(own for _, own in found) == rows == len(whole)
    torch.testing.assert_close(torch.tensor([total for total, _ in found]).sum(0), torch.tensor(whole))


def test_no_calls_at_all_are_refused() -> None:
    with pytest.raises(QuantizationError, match="No rank has a call"):
        gather(tiny_unet(), "conv_in", [])


def test_data_is_empty_where_a_rank_has_none() -> None:
    data = BlockData(torch.full((3, 1), -1), torch.device("cpu"))
    assert len(data) == 0
    assert data.of(torch.arange(3)).tolist() == []
