"""Stage A: rounding that is 0 or 1, the best of all where that is known, never worse, the same however it is run."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.prepared import NETWORKS, calls_of, prepared
from helpers.processes import on_ranks
from lightning_quant.accuquant.blocks import BlockData, gather
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.ranges import activation_quantizers
from lightning_quant.accuquant.reconstruction import (
    Reconstruction,
    Schedule,
    _weights,
    block_error,
    reconstruct_block,
)
from lightning_quant.accuquant.settings import Settings
from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.rounding import rounding_penalty
from lightning_quant.nn import swap
from lightning_quant.nn.structure import quantized_layers, quantizers_of
from lightning_quant.quantizers.rounded import RoundedQuantizer
from lightning_quant.quantizers.timestep import TimestepQuantizer

BLOCK = "mid_block.resnets.0"


def quantizer_state(network: nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{k}": v.clone() for n, q in quantizers_of(network) for k, v in q.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def reconstruction(kind: str = "unet", iterations: int = 12, seed: int = 0, **arguments: Any) -> Reconstruction:
    denoiser, plan, calls = prepared(kind, **arguments)
    return Reconstruction(denoiser.network, plan, Settings(reconstruction=iterations, seed=seed), calls)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_the_gradient_of_the_penalty(beta: float) -> None:
    alpha = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(rounding_penalty(alpha, beta), alpha)
    sigmoid = alpha.detach().sigmoid()
    h = 1.2 * sigmoid - 0.1
    slope = 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
    position = 2 * h.clamp(0, 1) - 1
    torch.testing.assert_close(found, -beta * position.abs() ** (beta - 1) * position.sign() * 2 * slope)
    # Downhill is away from the middle, and nothing happens where it is decided.
    assert bool((found * alpha.detach() <= 0).all())
    assert float(found[0]) == float(found[-1]) == 0


def test_the_exponent_falls_after_the_warm_up() -> None:
    schedule = Schedule(50)
    betas = [schedule.beta(i) for i in range(50)]
    assert betas[:10] == [None] * 10
    known = [beta for beta in betas if beta is not None]
    assert known[0] == 20
    assert all(a > b > 2 for a, b in itertools.pairwise(known))
    assert schedule.beta(50) == 2


def test_rates_are_those_of_the_papers_at_their_iterations_and_more_with_fewer() -> None:
    assert Schedule(20_000).rates == Schedule(40_000).rates == (1e-3, 4e-5)
    some = [Schedule(n).rates for n in (20_000, 2_000, 100, 1)]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(some))
    assert Schedule(100, 0.5, 0.25).rates == (0.5, 0.25)


# -- one layer --------------------------------------------------------------------------------------------------------


def layer_with(weight: Tensor, x: Tensor, bits: int = 3) -> tuple[nn.Module, BlockData]:
    """A network of one layer, its activations all but exact, and its data."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    network, inputs, weights = nn.Sequential(layer).eval(), TimestepQuantizer(16), RoundedQuantizer(bits)
    swap(layer, inputs, weights)
    inputs.initialize(x)
    weights.initialize(weight)
    return network, gather(network, "0", [(partial(network, x), 0)])


def best_error(network: nn.Module, data: BlockData) -> float:
    """The least that any rounding of the one layer leaves, by trying all."""
    layer: Any = network.get_submodule("0")
    quantizer = layer.weight_quantizer
    scale, zero_point = quantizer.affine(2)
    base = (layer.weight / scale).floor() + zero_point
    errors = []
    with torch.no_grad():
        for ups in itertools.product((0, 1), repeat=base.shape[1]):
            codes = (base + torch.tensor(ups)).clamp(0, quantizer.grid.high)
            weight = (codes - zero_point) * scale
            output = nn.functional.linear(layer.input_quantizer(data.inputs[0]), weight)
            errors.append((output - data.targets).double().square().mean(0))
    return float(torch.stack(errors).min(0).values.mean())


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_of_all_roundings(seed: int) -> None:
    """Inputs that go together: the errors of their weights should cancel, which nearest rounding does not see."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.rand(64, 1, generator=generator)
    x = common + 0.1 * torch.randn(64, 8, generator=generator)
    network, data = layer_with(torch.randn(4, 8, generator=generator), x)
    found = reconstruct_block(network, "0", data, Schedule(400, rate=0.05, activation_rate=0.0))
    best = best_error(network, data)
    assert best * 0.999 <= found["after"] <= best * 1.35
    assert found["after"] < 0.2 * found["before"]


def test_rounding_is_up_or_down_at_the_end_and_nothing_learns_any_more() -> None:
    torch.manual_seed(0)
    x = torch.rand(32, 8) + 1
    network, data = layer_with(torch.randn(4, 8), x)
    layer: Any = network[0]  # type: ignore[index]
    reconstruct_block(network, "0", data, Schedule(60))
    quantizer = layer.weight_quantizer
    scale, zero_point = quantizer.affine(2)
    base = (layer.weight / scale).floor() + zero_point
    lowest, highest = base.clamp(0, 7), (base + 1).clamp(0, 7)
    codes = quantizer.codes.float()
    assert bool(((codes == lowest) | (codes == highest)).all())
    assert bool((codes != (layer.weight / scale).round() + zero_point).any())
    assert torch.equal(layer(x), nn.functional.linear(layer.input_quantizer(x), (codes - zero_point) * scale))
    assert not quantizer.learns
    assert not quantizer.scale.requires_grad
    assert layer.input_quantizer._leaves is None


@pytest.mark.parametrize("schedule", [Schedule(1, rate=100.0), Schedule(5, rate=3.0, activation_rate=2.0), Schedule(0)])
def test_what_makes_it_worse_is_thrown_away(schedule: Schedule) -> None:
    denoiser, _, calls = prepared("unet")
    network = denoiser.network
    before = quantizer_state(network)
    data = gather(network, BLOCK, calls)
    found = reconstruct_block(network, BLOCK, data, schedule)
    assert found["after"] == found["before"] == block_error(network.get_submodule(BLOCK), data)
    assert equal(quantizer_state(network), before)


def test_a_loss_that_is_nan_is_thrown_away() -> None:
    denoiser, _, calls = prepared("unet")
    before = quantizer_state(denoiser.network)
    data = gather(denoiser.network, BLOCK, calls)
    found = reconstruct_block(denoiser.network, BLOCK, data, Schedule(3, rate=float("inf")))
    assert found["after"] == found["before"]
    assert equal(quantizer_state(denoiser.network), before)


def test_an_error_midway_leaves_everything_as_it_was() -> None:
    denoiser, _, calls = prepared("unet")
    network = denoiser.network
    before, block = quantizer_state(network), network.get_submodule(BLOCK)
    data, runs = gather(network, BLOCK, calls), []

    def stop(*_: Any) -> None:
        runs.append(1)
        if len(runs) > 5:
            raise KeyboardInterrupt

    block.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_block(network, BLOCK, data, Schedule(10))
    assert equal(quantizer_state(network), before)
    assert not any(layer.weight_quantizer.learns for _, layer in quantized_layers(network))  # type: ignore[union-attr]
    assert all(quantizer._leaves is None for quantizer in activation_quantizers(network).values())


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "starts", "guidance", "iterations"),
    [("unet", (), None, 8), ("unet", (801, 401), None, 8), ("condition", (), 3.0, 8), ("dit", (801, 1), 3.0, 20)],
)
def test_all_blocks_get_better_and_the_network_with_them(
    kind: str, starts: tuple[int, ...], guidance: float | None, iterations: int
) -> None:
    denoiser, plan, calls = prepared(kind, 2, starts, guidance)
    network, untouched = denoiser.network, Denoiser(NETWORKS[kind](), guidance)
    with torch.no_grad():
        target = torch.cat([run() for run, _ in calls_of(untouched, [0, 1], 2)])  # type: ignore[misc]
        start = torch.cat([run() for run, _ in calls])  # type: ignore[misc]
    branches = 1 if guidance is None else 2
    stage = Reconstruction(network, plan, Settings(reconstruction=iterations), calls, branches)
    found = {block: stage.run(block) for block in stage.blocks}
    assert all(errors["after"] <= errors["before"] for errors in found.values())
    assert sum(errors["after"] < errors["before"] for errors in found.values()) > 0.6 * len(found)
    with torch.no_grad():
        end = torch.cat([run() for run, _ in calls])  # type: ignore[misc]
    assert float((end - target).square().mean()) < float((start - target).square().mean())


def test_the_error_that_is_told_is_that_of_the_block() -> None:
    stage = reconstruction()
    found = stage.run(BLOCK)
    data = gather(stage.network, BLOCK, stage.calls)
    with torch.no_grad():
        output, target = data.run(stage.network.get_submodule(BLOCK), torch.arange(len(data)))
    assert found["after"] == pytest.approx(float((output.double() - target).square().mean()), rel=1e-6)
    assert found["after"] < found["before"]


def test_one_block_changes_no_other_and_no_parameter() -> None:
    stage = reconstruction()
    network = stage.network
    network.train()
    before, parameters = quantizer_state(network), deepcopy(dict(network.named_parameters()))
    stage.run(BLOCK)
    after = quantizer_state(network)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.endswith("codes") for key in changed)
    assert any(key.endswith("input_quantizer.scale") for key in changed)
    assert all(key.startswith(f"{BLOCK}.") for key in changed)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert all(module.training for module in network.modules())


def test_weights_keep_their_scales() -> None:
    stage = reconstruction()
    before = quantizer_state(stage.network)
    stage.run(BLOCK)
    after = quantizer_state(stage.network)
    for key in before:
        if "weight_quantizer" in key and not key.endswith("codes"):
            # By way of their logarithm.
            torch.testing.assert_close(before[key], after[key], rtol=1e-6, atol=0, msg=key)


def test_it_goes_on_after_any_block_as_if_it_had_not_stopped() -> None:
    whole, first = reconstruction(), reconstruction()
    blocks = whole.blocks[:6]
    for block in blocks:
        whole.run(block)
    for block in blocks[:3]:
        first.run(block)
    second = reconstruction()
    second.network.load_state_dict(first.network.state_dict())
    for block in blocks[3:]:
        second.run(block)
    assert equal(quantizer_state(second.network), quantizer_state(whole.network))


def test_the_seed_decides() -> None:
    states = []
    for seed in (0, 0, 1):
        stage = reconstruction(seed=seed, images=16)
        stage.run(BLOCK)
        states.append(quantizer_state(stage.network))
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


def test_a_name_that_is_no_block_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'mid_block' is not a block: expected one of time_embedding"):
        reconstruction().run("mid_block")


# -- ranks ------------------------------------------------------------------------------------------------------------


def on_share(rank: int, ranks: int, kind: str = "unet", images: int = 5) -> tuple[dict[str, float], dict[str, Any]]:
    """One block, from this rank's images alone."""
    guidance = None if kind == "unet" else 3.0
    denoiser, plan, _ = prepared(kind, images, guidance=guidance)
    own = list(range(images))[rank::ranks]
    calls = calls_of(denoiser, own, images) if own else []
    branches = 1 if guidance is None else 2
    stage = Reconstruction(denoiser.network, plan, Settings(reconstruction=30), calls, branches)
    block = next(name for name in stage.blocks if "resnets" in name or "transformer_blocks" in name)
    errors = stage.run(block)
    return errors, {key: value.numpy() for key, value in quantizer_state(denoiser.network).items()}


class Recorder:
    """In place of Adam: keeps the gradients of each update, and moves nothing."""

    found: ClassVar[list[Any]] = []

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.leaves = [leaf for group in groups for leaf in group["params"]]

    def step(self) -> None:
        Recorder.found.append(torch.cat([leaf.grad.flatten() for leaf in self.leaves]).numpy())


def gradients_on(rank: int, ranks: int) -> list[Any]:
    Recorder.found.clear()
    on_share(rank, ranks)
    return Recorder.found


def test_gradients_are_those_of_the_loss_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Adam", Recorder)
    alone = np.stack(gradients_on(0, 1))
    assert len(alone) == 30
    for found in on_ranks(2, gradients_on):
        np.testing.assert_allclose(np.stack(found), alone, rtol=1e-3, atol=1e-6)
    # By hand, at the last update: all images fit into one batch.
    denoiser, _, calls = prepared("unet", 5)
    network, block = denoiser.network, "down_blocks.0.resnets.0"
    data = gather(network, block, calls)
    module, beta = network.get_submodule(block), Schedule(30).beta(29)
    assert beta is not None
    begun = [q.begin() for q in activation_quantizers(module).values()]
    weights = [q.begin(layer.weight, soft=True)["alpha"] for layer, q in _weights(module)]
    ranges = [leaves[name] for name in ("log_ratio", "zero_point") for leaves in begun]
    output, target = data.run(module, torch.arange(len(data)))
    loss = (output - target).square().sum(1).mean()
    penalty = torch.stack([rounding_penalty(alpha, beta) for alpha in weights]).sum()
    by_hand = torch.autograd.grad(loss + 0.01 * penalty, [*ranges, *weights])
    np.testing.assert_allclose(alone[-1], torch.cat([g.flatten() for g in by_hand]).numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "ranks", "images"), [("unet", 2, 5), ("dit", 2, 4), ("unet", 3, 2)])
def test_ranks_agree_and_find_what_one_finds_on_the_union(kind: str, ranks: int, images: int) -> None:
    """With three ranks and two images the last rank has none."""
    errors, whole = on_share(0, 1, kind, images)
    found = on_ranks(ranks, partial(on_share, kind=kind, images=images))
    for other_errors, state in found:
        assert other_errors == found[0][0]
        assert all(np.array_equal(value, found[0][1][key], equal_nan=True) for key, value in state.items())
    errors_there, state = found[0]
    assert errors_there["before"] == pytest.approx(errors["before"], rel=1e-5)
    # The order of a sum may turn a code, on some processors and not on others.
    assert errors_there["after"] == pytest.approx(errors["after"], rel=5e-2)
    assert errors_there["after"] < errors_there["before"]
    for key, value in whole.items():
        if key.endswith("codes"):
            assert (value != state[key]).mean() < 0.01, key
        else:
            np.testing.assert_allclose(state[key], value, rtol=1e-3, atol=1e-3, err_msg=key)
