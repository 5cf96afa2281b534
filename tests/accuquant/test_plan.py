"""The plan is what the denoiser did when it was called once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.diffusion import tiny_condition_unet
from helpers.ranged import call, network_of, plan_of
from lightning_quant.accuquant.plan import FIRST_AND_LAST, DenoiserPlan, compared, plan_denoiser
from lightning_quant.accuquant.settings import Settings
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.nn.layers import LAYERS, swap
from lightning_quant.quantizers import FixedQuantizer

KINDS = ("ddpm", "sd", "dit")
every = pytest.mark.parametrize("kind", KINDS)


def names(plan: DenoiserPlan, **wanted: Any) -> set[str]:
    return {row.name for row in plan.rows if all(getattr(row, key) == value for key, value in wanted.items())}


@every
def test_every_layer_and_attention_is_a_row(kind: Any) -> None:
    network = network_of(kind)
    plan = plan_of(network)
    modules = dict(network.named_modules())
    layers = {name for name, module in modules.items() if type(module) in LAYERS}
    assert names(plan, kind="layer") == layers
    assert names(plan, kind="attention") == {n for n, module in modules.items() if type(module).__name__ == "Attention"}
    assert len(plan.rows) == len({row.name for row in plan.rows})


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [("ddpm", "conv_in", "conv_out"), ("sd", "conv_in", "conv_out"), ("dit", "pos_embed.proj", "proj_out_2")],
)
def test_the_first_and_the_last_layer_have_bits_of_their_own(kind: Any, first: str, last: str) -> None:
    plan = plan_of(network_of(kind), 4, 6, first_and_last_bits=7)
    assert names(plan, note=FIRST_AND_LAST) == {first, last}
    for row in plan.chosen("layer"):
        assert (row.weight_bits, row.activation_bits) == ((7, 7) if row.name in (first, last) else (4, 6))


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2


class Same(nn.Conv2d):
    pass


def test_a_layer_with_a_forward_of_its_own_is_a_row_that_says_so_and_a_subclass_without_is_quantized() -> None:
    network = nn.Sequential(Same(1, 2, 1), Doubled(2, 2, 1), nn.Conv2d(2, 1, 1))
    plan = plan_denoiser(network, Settings(4, 8), lambda: network(torch.zeros(1, 1, 2, 2)))
    assert names(plan, left_out=True) == names(plan, note="Doubled has its own forward") == {"1"}
    assert names(plan, note=FIRST_AND_LAST) == {"0", "2"}


@every
def test_attentions_quantize_activations_alone(kind: Any) -> None:
    rows = plan_of(network_of(kind), 4, 6).chosen("attention")
    assert rows
    assert {(row.weight_bits, row.activation_bits, row.parts) for row in rows} == {(0, 6, ())}


@pytest.mark.parametrize("kind", ["ddpm", "sd"])
def test_what_follows_a_skip_connection_has_a_range_for_each_half(kind: Any) -> None:
    network = network_of(kind)
    found: dict[str, tuple[int, int]] = {}
    for name, module in network.named_modules():
        if type(module).__name__ == "ResnetBlock2D" and name.startswith("up_blocks"):
            for layer in ("conv1", "conv_shortcut"):
                found[f"{name}.{layer}"] = (module.conv1.in_channels, module.conv1.out_channels)
    plan = plan_of(network)
    split = {row.name: row.parts for row in plan.rows if row.parts}
    assert split.keys() == found.keys()
    for name, parts in split.items():
        assert len(parts) == 2
        assert sum(parts) == found[name][0]


def test_the_halves_are_those_that_were_put_together() -> None:
    network = network_of()
    expected: dict[str, tuple[int, ...]] = {}
    joined: list[tuple[int, ...]] = []
    original = torch.cat

    def noting(tensors: Any, dim: int = 0) -> Tensor:
        if dim == 1:
            joined.append(tuple(t.shape[1] for t in tensors))
        return original(tensors, dim)

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: expected.update({f"{name}.conv1": joined[-1]})

    blocks = [
        (n, m) for n, m in network.named_modules() if n.startswith("up_blocks") and type(m).__name__ == "ResnetBlock2D"
    ]
    hooks = [block.register_forward_pre_hook(before(name)) for name, block in blocks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", noting)
        call(network, 1)
    for hook in hooks:
        hook.remove()
    found = {row.name: row.parts for row in plan_of(network).rows if row.name in expected}
    assert found == expected
    assert len(set(found.values())) > 1


def test_rows_are_in_the_order_of_the_calls() -> None:
    network, order = network_of(), []
    rows = [row.name for row in plan_of(network).rows]
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name in rows
    ]
    call(network, 1)
    for hook in hooks:
        hook.remove()
    assert order == rows


@every
def test_planning_leaves_the_network_as_it_is(kind: Any) -> None:
    network, plain = network_of(kind), network_of(kind)
    plan_of(network)
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert repr(network) == repr(plain)
    assert torch.equal(call(network, 3), call(plain, 3))


def test_after_an_error_no_hooks_are_left() -> None:
    network = network_of()

    def run() -> None:
        call(network, 1)
        raise KeyError("the call")

    with pytest.raises(KeyError, match="the call"):
        plan_denoiser(network, Settings(), run)
    assert not any(module._forward_pre_hooks for module in network.modules())


# -- left out ---------------------------------------------------------------------------------------------------------


def test_patterns_leave_layers_and_attentions_out() -> None:
    network = tiny_condition_unet()
    plan = plan_of(network, exclude=("time_embedding.*", "*.attn2"))
    left = names(plan, left_out=True)
    assert left == names(plan, note="excluded")
    attentions = {name for name, _ in network.named_modules() if name.endswith(".attn2")}
    projections = {f"{name}.{layer}" for name in attentions for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert left == {"time_embedding.linear_1", "time_embedding.linear_2", *attentions, *projections}


def test_a_pattern_that_matches_nothing_is_refused_with_names_near_it() -> None:
    with pytest.raises(
        ConfigurationError, match=r"exclude='conv_inn' matches none of the \d+ layers. Close matches: conv_in"
    ):
        plan_of(network_of(), exclude=("conv_out", "conv_inn"))


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"exclude=\['\*'\] leaves nothing to quantize: write fewer patterns"):
        plan_of(network_of(), exclude=("*",))


class Own(nn.Module):
    """A denoiser of nobody's library."""

    def __init__(self, join: Callable[..., Tensor] = torch.cat) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.first, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.after, self.last = nn.Conv2d(7, 4, 1), nn.Conv2d(4, 3, 1)
        self.join = join

    def forward(self, sample: Tensor, timestep: int) -> Tensor:
        shift = self.time(torch.full((len(sample), 1), float(timestep)))
        x = self.first(sample) + shift[:, :, None, None]
        found: Tensor = self.last(self.after(self.join([x, sample], dim=1)))
        return found


def plan_own(network: nn.Module, **settings: Any) -> DenoiserPlan:
    return plan_denoiser(network, Settings(**settings), partial(network, torch.zeros(1, 3, 2, 2), 5))


def test_layers_that_are_not_called_stay_in_float_and_stand_at_the_end() -> None:
    plan = plan_own(Own())
    assert [row.name for row in plan.rows] == ["time", "first", "after", "last", "unused"]
    assert (plan.rows[-1].note, plan.rows[-1].left_out) == ("not called", True)
    assert names(plan, note=FIRST_AND_LAST) == {"first", "last"}
    assert "1 left in float: unused" in plan.summary()


def test_an_attention_that_is_not_called_stays_in_float() -> None:
    network = network_of()
    network.spare = network_of().mid_block.attentions[0]
    row = next(row for row in plan_of(network).rows if row.name == "spare")
    assert (row.kind, row.note, row.left_out) == ("attention", "not called", True)


@pytest.mark.parametrize("join", [torch.cat, torch.concat, torch.concatenate])
def test_a_concatenation_goes_by_three_names(join: Callable[..., Tensor]) -> None:
    parts = {row.name: row.parts for row in plan_own(Own(join)).rows}
    assert parts == {"time": (), "first": (), "after": (4, 3), "last": (), "unused": ()}


def test_other_axes_are_no_halves_of_channels() -> None:
    network = Own(lambda tensors, dim: torch.cat([t.transpose(1, 2) for t in tensors], dim=2).transpose(1, 2))
    assert not any(row.parts for row in plan_own(network).rows)


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(3, 3)

    def forward(self, sample: Tensor, timestep: int) -> Tensor:
        return sample


def test_a_network_that_calls_no_layer_is_refused_with_what_to_write() -> None:
    message = r"Empty called none of the layers .*Linear.*give the denoiser itself, for example denoiser='unet'"
    with pytest.raises(UnsupportedModelError, match=message):
        plan_own(Empty())


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_summary_counts_and_the_table_has_a_line_for_each() -> None:
    plan = plan_of(network_of(), 4, 6, exclude=("time_embedding.*",))
    split = sum(bool(row.parts) for row in plan.rows)
    layers, attentions = len(plan.chosen("layer")), len(plan.chosen("attention"))
    assert plan.summary() == (
        f"AccuQuant: {layers} layers to W4A6 (2 of them, first and last, to 8 bits); {attentions} attentions (softmax 8"
        f" bits); {split} layers with one range per half of a skip connection; 2 left in float:"
        " time_embedding.linear_1, time_embedding.linear_2."
    )
    text = str(plan)
    assert text.endswith(plan.summary())
    assert all(row.name in text for row in plan.rows)
    assert "halves of 32 + 32 channels" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("conv_in"))
    assert line.split() == ["conv_in", "8", "8", "first", "or", "last"]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        # The first and the last layer alone, which say nothing of the others.
        ([8, 8], 4),
        ([8, 4, 8], 4),
        ([8, 6, 8], 6),
        ([8, 6, 5, 8], [5, 6]),
        ([8, 8, 8], 8),
    ],
)
def test_bits_are_compared_without_those_of_the_ends(bits: list[int], expected: Any) -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in bits))
    for layer, width in zip(network, bits, strict=True):
        swap(layer, weight_quantizer=FixedQuantizer(width, axis=0))
    compared_bits = {name: (found, wanted) for name, found, wanted in compared(network, Settings())}
    assert compared_bits == {"weight_bits": (expected, 4), "activation_bits": (8, 8), "softmax_bits": (8, 8)}
