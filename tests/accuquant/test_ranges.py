"""Ranges from histograms: near those of a search over all values, whatever the order, the batches and the ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.diffusion import tiny_inputs
from helpers.processes import on_ranks
from helpers.ranged import TIMESTEPS, call, network_of, plan_of, ranged
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.plan import plan_denoiser
from lightning_quant.accuquant.ranges import activation_quantizers, activation_ranges, prepare, weight_ranges
from lightning_quant.accuquant.settings import Settings
from lightning_quant.errors import QuantizationError
from lightning_quant.functional import decode, encode, mse_search, scale_and_zero_point
from lightning_quant.nn.attention import swapped_attentions
from lightning_quant.nn.structure import quantized_layers
from lightning_quant.quantizers import RoundedQuantizer, TimestepQuantizer

Call = Callable[[], object]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child that uses OpenMP after its parent did would wait for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Own(nn.Module):
    """Small, and its first layer sees the sample itself."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(8, 4, 1)
            self.third, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        x = torch.cat([F.silu(self.first(sample)), 20 * sample], dim=1)
        found: Tensor = self.last(F.silu(self.third(F.silu(self.second(x)))))
        return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample_at(t: int, rows: slice = slice(None)) -> Tensor:
    return (normal(4, 3, 6, 6, seed=t) * (1 + t / 300))[rows]


def own(starts: Sequence[int] = (), bits: int = 4) -> Own:
    network = Own()
    plan = plan_denoiser(network, Settings(4, bits, first_and_last_bits=bits), partial(network, sample_at(1), 1))
    prepare(network, plan, starts)
    return network.eval()


def calls_of(network: nn.Module, timesteps: Sequence[int], rows: slice = slice(None)) -> list[Call]:
    return [partial(network, sample_at(t, rows), t) for t in timesteps]


def found(network: nn.Module) -> dict[str, list[float]]:
    """Scales and zero points of all activations."""
    quantizers = activation_quantizers(network).items()
    return {f"{n}.{s}": [*q.scale.flatten().tolist(), *q.zero_point.flatten().tolist()] for (n, s), q in quantizers}


# -- prepare ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddpm", "sd", "dit"])
@pytest.mark.parametrize("starts", [(), (999, 500)])
def test_a_prepared_network_computes_what_the_float_one_did(kind: Any, starts: tuple[int, ...]) -> None:
    network, plain = network_of(kind), network_of(kind)
    plan = plan_of(network)
    prepare(network, plan, starts)
    with torch.no_grad():
        # Attention is computed step by step, so not bit for bit.
        torch.testing.assert_close(call(network, 300), call(plain, 300), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in quantized_layers(network)} == {row.name for row in plan.chosen("layer")}
    assert {name for name, _ in swapped_attentions(network)} == {row.name for row in plan.chosen("attention")}
    assert not any(quantizer.ready for quantizer in activation_quantizers(network).values())


def test_bits_and_parts_are_the_plans() -> None:
    network = network_of()
    plan = plan_of(network, 3, 6, first_and_last_bits=8, softmax_bits=7, exclude=("time_embedding.*",))
    prepare(network, plan, (999, 300))
    quantizers, rows = activation_quantizers(network), {row.name: row for row in plan.rows}
    for (name, slot), quantizer in quantizers.items():
        row = rows[name]
        assert not row.left_out
        assert quantizer.bits == (7 if slot == "softmax_quantizer" else row.activation_bits)
        assert (quantizer.starts, quantizer.parts) == ((999, 300), row.parts)
    for name, layer in quantized_layers(network):
        assert isinstance(layer.weight_quantizer, RoundedQuantizer)
        assert layer.weight_quantizer.bits == rows[name].weight_bits
    assert len(quantizers) == len(plan.chosen("layer")) + 4 * len(plan.chosen("attention"))


# -- the search -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def error(x: Tensor, low: Tensor, high: Tensor, bits: int) -> float:
    scale, zero_point, grid = scale_and_zero_point(low, high, bits, symmetric=False)
    return float((decode(encode(x, scale, grid, zero_point), scale, zero_point) - x).double().square().mean())


VALUES: dict[str, Tensor] = {
    "normal": normal(20000),
    "one-signed": normal(20000).abs(),
    "all below zero": -1 - normal(20000).square(),
    "SiLU": F.silu(3 * normal(20000)),
    "heavy tails": normal(20000) ** 3,
    "softmax": (3 * normal(200, 100)).softmax(-1).flatten(),
    "one far value": torch.cat([normal(20000), torch.tensor([40.0])]),
    "uniform": torch.linspace(-1, 3, 20000),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_error_is_within_a_few_percent_of_a_search_over_all_values(values: Tensor, bits: int) -> None:
    network = nn.Conv1d(1, 1, 1)
    plan = plan_denoiser(network, Settings(4, bits, first_and_last_bits=bits), lambda: network(values[None, None, :9]))
    prepare(network, plan)
    activation_ranges(network.eval(), [partial(network, part[None, None]) for part in values.split(999)])
    quantizer: Any = network.input_quantizer
    ours = float((quantizer(values) - values).double().square().mean())
    assert ours <= 1.05 * error(values, *mse_search(values, bits, symmetric=False), bits)
    assert ours <= error(values, values.min(), values.max(), bits) * 1.001


def test_halves_of_a_skip_connection_have_ranges_of_their_own() -> None:
    network = own()
    activation_ranges(network, calls_of(network, (900, 100)))
    quantizer: Any = network.second.input_quantizer
    assert quantizer.parts == (5, 3)
    plain = Own()
    with torch.no_grad():
        halves = [[F.silu(plain.first(sample_at(t))) for t in (900, 100)], [20 * sample_at(t) for t in (900, 100)]]
    for part, tensors in enumerate(halves):
        values = torch.cat([t.flatten() for t in tensors])
        scale, zero_point = quantizer.scale[0, part], quantizer.zero_point[0, part]
        ours = decode(encode(values, scale, quantizer.grid, zero_point), scale, zero_point)
        best = error(values, *mse_search(values, 4, symmetric=False), 4)
        assert float((ours - values).double().square().mean()) <= 1.05 * best
    assert quantizer.scale[0, 1] > 5 * quantizer.scale[0, 0]


def test_the_ranges_of_a_group_are_those_of_its_timesteps_alone() -> None:
    timesteps = {0: (999, 700), 1: (600, 400), 2: (200, 1)}
    network = own(starts=(999, 600, 200))
    activation_ranges(network, calls_of(network, [t for group in timesteps.values() for t in group]))
    for group, own_timesteps in timesteps.items():
        alone = own()
        activation_ranges(alone, calls_of(alone, own_timesteps))
        for key, quantizer in activation_quantizers(network).items():
            other = activation_quantizers(alone)[key]
            assert torch.equal(quantizer.scale[group], other.scale[0])
            assert torch.equal(quantizer.zero_point[group], other.zero_point[0])
    assert activation_quantizers(network)["first", "input_quantizer"].scale.unique().numel() == 3


def test_order_and_batches_make_no_difference() -> None:
    timesteps = (999, 700, 600, 400, 200, 1)
    networks = [own((999, 500)) for _ in range(3)]
    activation_ranges(networks[0], calls_of(networks[0], timesteps))
    shuffled = calls_of(networks[1], timesteps)
    random.Random(0).shuffle(shuffled)
    activation_ranges(networks[1], shuffled)
    halves = [run for rows in (slice(0, 1), slice(1, 4)) for run in calls_of(networks[2], timesteps, rows)]
    activation_ranges(networks[2], halves)
    assert found(networks[0]) == found(networks[1]) == found(networks[2])


def test_calibrating_calls_see_the_float_network() -> None:
    network, outputs = network_of(), []
    prepare(network, plan_of(network))
    activation_ranges(network, [lambda t=t: outputs.append(call(network, t)) for t in TIMESTEPS])  # type: ignore[misc]
    plain = network_of()
    expected = [call(plain, t) for t in TIMESTEPS] * 2
    for output, other in zip(outputs, expected, strict=True):
        assert not output.requires_grad
        torch.testing.assert_close(output, other, rtol=1e-4, atol=1e-5)


def test_the_observers_are_gone_afterwards_and_after_an_error() -> None:
    network = network_of()
    prepare(network, plan_of(network))
    hooks = sum(len(module._forward_pre_hooks) for module in network.modules())

    def fail() -> None:
        call(network, 1)
        raise KeyError("the call")

    with pytest.raises(KeyError, match="the call"):
        activation_ranges(network, [fail])
    activation_ranges(network, [partial(call, network, 1)])
    assert sum(len(module._forward_pre_hooks) for module in network.modules()) == hooks
    assert all(attention.observer is None for _, attention in swapped_attentions(network))


@pytest.mark.parametrize("kind", ["ddpm", "sd", "dit"])
def test_all_slots_of_a_denoiser_get_ranges(kind: Any) -> None:
    network = ranged(kind, starts=(999, 600, 200))
    quantizers = activation_quantizers(network)
    assert all(quantizer.ready and quantizer.scale.gt(0).all() for quantizer in quantizers.values())
    x, conditioning = tiny_inputs(network)
    with torch.no_grad():
        plain, moved = (Denoiser(net)(x, 500, conditioning) for net in (network_of(kind), network))
    assert 0 < (moved - plain).norm() / plain.norm() < 0.5


@pytest.mark.parametrize("bias", [0.0, 2.0, -0.5])
def test_a_constant_activation_has_a_definite_range(bias: float) -> None:
    network = own(bits=8)
    with torch.no_grad():
        network.second.weight.zero_()
        network.second.bias.fill_(bias)  # type: ignore[union-attr]
    activation_ranges(network, calls_of(network, (900, 300)))
    quantizer: Any = network.third.input_quantizer
    assert quantizer.ready
    assert torch.cat([quantizer.scale, quantizer.zero_point]).isfinite().all()
    constant = F.silu(torch.full((1, 4, 1, 1), bias))
    assert torch.allclose(quantizer(constant), constant, rtol=1e-3)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_take_the_ranges_of_least_error_of_each_channel() -> None:
    network = own()
    weight_ranges(network)
    for _, layer in quantized_layers(network):
        quantizer: Any = layer.weight_quantizer
        for channel, weight in zip(quantizer(layer.weight), layer.weight, strict=True):
            best = error(weight, *mse_search(weight, quantizer.bits, symmetric=False), quantizer.bits)
            assert float((channel - weight).detach().double().square().mean()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_range_is_refused_with_what_to_write(value: float) -> None:
    network = own()
    with torch.no_grad():
        network.third.weight.fill_(value)
    with pytest.raises(QuantizationError, match=r"weight of 'third' is all 0, .*leave it out with exclude=\['third'\]"):
        weight_ranges(network)


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_group_that_no_call_belongs_to_is_refused() -> None:
    network = own((999, 500, 100))
    with pytest.raises(
        QuantizationError, match=r"of \w+ was never called in some group .* activation_parameters='shared'"
    ):
        activation_ranges(network, calls_of(network, (900, 300)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_with_the_layer(value: float) -> None:
    network = own()
    broken = sample_at(5)
    broken[1, 2, 3, 4] = value
    message = r"input_quantizer of first got NaN or infinity: .*precision='32-true', or leave the module out"
    with pytest.raises(QuantizationError, match=message):
        activation_ranges(network, [partial(network, sample_at(3), 3), partial(network, broken, 5)])


class Untold(Own):
    def forward(self, sample: Tensor, sigma: Any) -> Tensor:
        return super().forward(sample, sigma)


def test_groups_without_a_timestep_are_refused_and_not_guessed() -> None:
    network = Untold()
    prepare(network, plan_denoiser(network, Settings(), partial(network, sample_at(1), 1)), (999, 500))
    with pytest.raises(QuantizationError, match=r"call the denoiser itself with its timestep"):
        activation_ranges(network, calls_of(network, (900, 300)))


# -- ranks ------------------------------------------------------------------------------------------------------------


def on_shares(rank: int, ranks: int) -> dict[str, list[float]]:
    """Each rank has some of the images of each timestep."""
    network = own((999, 500))
    activation_ranges(network, calls_of(network, (900, 600, 300, 1), slice(rank, None, ranks)))
    return found(network)


def first_alone(rank: int, ranks: int) -> dict[str, list[float]]:
    network = own((999, 500))
    activation_ranges(network, calls_of(network, (900, 300)) if rank == 0 else [])
    return found(network)


@pytest.mark.parametrize("job", [on_shares, first_alone])
def test_two_ranks_find_what_one_finds_on_all_images(job: Any) -> None:
    alone = job(0, 1)
    assert on_ranks(2, job) == [alone, alone]


def test_ranges_are_fp32_and_zero_is_a_code() -> None:
    network = own()
    activation_ranges(network, calls_of(network, (900, 1)))
    for quantizer in activation_quantizers(network).values():
        assert isinstance(quantizer, TimestepQuantizer)
        assert quantizer.scale.dtype == quantizer.zero_point.dtype == torch.float32
        assert quantizer(torch.zeros(1, sum(quantizer.parts) or 3, 1, 1)).eq(0).all()
