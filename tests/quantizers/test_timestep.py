"""A range for each group of timesteps and each part of the channels."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.oracle import round_through
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.functional import fake_quantize, scale_and_zero_point
from lightning_quant.functional.grid import unsigned_grid
from lightning_quant.quantizers import TimestepQuantizer
from lightning_quant.quantizers.base import quantizer_of_state
from lightning_quant.quantizers.timestep import group_of

STARTS = (900, 400, 30)
few = settings(deadline=None, max_examples=60)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranged(bits: int = 4, starts: Any = STARTS, parts: tuple[int, ...] = ()) -> TimestepQuantizer:
    """Every group and part has another range."""
    quantizer = TimestepQuantizer(bits, starts, parts)
    numbers = 1 + torch.arange(quantizer.scale.numel()).view(quantizer.scale.shape).float()
    quantizer.set_range(-numbers / 4, numbers)
    return quantizer


def plain(x: Tensor, number: int, bits: int = 4) -> Tensor:
    """With the range of one group and part, by the functions."""
    end = torch.tensor(1.0 + number)
    scale, zero_point, grid = scale_and_zero_point(-end / 4, end, bits, symmetric=False)
    return fake_quantize(x, scale, grid, zero_point)


@few
@given(st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True), st.integers(0, 999))
def test_a_group_holds_what_lies_between_its_start_and_the_next(starts: list[int], timestep: int) -> None:
    starts = sorted(starts, reverse=True)
    expected = max((g for g, start in enumerate(starts) if timestep <= start), default=0)
    assert group_of(starts, timestep) == expected
    assert group_of(starts, float(timestep)) == expected
    assert group_of(starts, torch.tensor(timestep)) == expected
    assert group_of(starts, torch.tensor([timestep, timestep])) == expected


@few
@given(st.lists(st.integers(0, 999), min_size=1, max_size=6))
def test_the_group_of_a_batch_is_that_of_its_items(timesteps: list[int]) -> None:
    one_by_one = [group_of(STARTS, t) for t in timesteps]
    found = group_of(STARTS, torch.tensor(timesteps))
    assert one_by_one == ([found] * len(timesteps) if isinstance(found, int) else found.tolist())


@pytest.mark.parametrize("starts", [(1, 2), (5, 5), (900, 400, 401)])
def test_starts_that_do_not_fall_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"starts=\(.*expected strictly decreasing timesteps, for example \(951,"
    ):
        TimestepQuantizer(4, starts)


@pytest.mark.parametrize(("timestep", "group"), [(999, 0), (401, 0), (400, 1), (31, 1), (30, 2), (0, 2)])
@pytest.mark.parametrize("shape", [(7,), (2, 6), (2, 5, 6), (2, 6, 3, 3)])
def test_one_timestep_takes_the_range_of_its_group(timestep: int, group: int, shape: tuple[int, ...]) -> None:
    x = normal(*shape) * 3
    assert torch.equal(ranged().at(timestep)(x), plain(x, group))
    assert torch.equal(ranged().at(torch.tensor([timestep]))(x), plain(x, group))


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 6, 4, 4), (3, 2, 5, 5)])
def test_a_batch_of_timesteps_is_a_loop_over_its_items(shape: tuple[int, ...]) -> None:
    x, timesteps = normal(*shape) * 3, torch.tensor([950, 20, 400])
    expected = torch.cat([plain(x[i : i + 1], group) for i, group in enumerate((0, 2, 1))])
    assert torch.equal(ranged().at(timesteps)(x), expected)


def test_rows_of_heads_take_the_timestep_of_their_image() -> None:
    x = normal(6, 4, 5) * 3
    expected = torch.cat([plain(x[:3], 0), plain(x[3:], 2)])
    assert torch.equal(ranged().at(torch.tensor([950, 20]))(x), expected)


def test_rows_that_no_timestep_belongs_to_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"tensor has 3 rows.* called with 2 different timesteps: call it with"):
        ranged().at(torch.tensor([950, 20]))(normal(3, 4))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 3, 3)])
def test_parts_are_quantizers_of_their_own(shape: tuple[int, ...]) -> None:
    x = normal(*shape) * 3
    halves = torch.cat([plain(x[:, :2], 0), plain(x[:, 2:], 1)], 1)
    assert torch.equal(ranged(starts=(), parts=(2, 4))(x), halves)
    later = torch.cat([plain(x[:, :2], 2), plain(x[:, 2:], 3)], 1)
    quantizer = ranged(starts=(900, 400), parts=(2, 4))
    assert torch.equal(quantizer.at(100)(x), later)
    assert torch.equal(quantizer.at(torch.tensor([950, 100]))(x), torch.cat([halves[:1], later[1:]]))


def test_initialise_searches_each_part_alone() -> None:
    x = normal(4, 6, 3, 3)
    x[:, 2:] *= 50
    split, whole = TimestepQuantizer(4, parts=(2, 4)), TimestepQuantizer(4)
    for quantizer in (split, whole):
        quantizer.initialize(x)
    alone = TimestepQuantizer(4)
    alone.initialize(x[:, :2])
    assert torch.equal(split(x)[:, :2], alone(x[:, :2]))
    assert (split(x) - x)[:, :2].norm() < 0.2 * (whole(x) - x)[:, :2].norm()


def test_several_groups_ask_for_a_timestep_and_one_does_not() -> None:
    with pytest.raises(QuantizationError, match=r"call the denoiser itself with its timestep, .*='shared'"):
        ranged()(normal(2, 3))
    assert torch.equal(ranged(starts=(700,))(normal(2, 3)), plain(normal(2, 3), 0))


def test_the_state_says_starts_and_parts() -> None:
    quantizer = ranged(5, STARTS, (2, 4))
    made = quantizer_of_state(quantizer.get_extra_state())
    assert isinstance(made, TimestepQuantizer)
    assert (made.bits, made.starts, made.parts) == (5, STARTS, (2, 4))
    other = TimestepQuantizer(5)
    other.load_state_dict(quantizer.state_dict())
    assert (other.starts, other.parts, other.group) == (STARTS, (2, 4), None)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_learning_starts_from_what_it_is_and_can_be_taken_back() -> None:
    quantizer, x = ranged(parts=(2, 4)).at(20), normal(3, 6) * 3
    before, state = quantizer(x), {k: v.clone() for k, v in quantizer.state_dict().items()}
    leaves = quantizer.begin()
    assert {name: leaf.shape for name, leaf in leaves.items()} == dict.fromkeys(("log_ratio", "zero_point"), (3, 2))
    assert torch.equal(quantizer(x), before)
    with torch.no_grad():
        leaves["log_ratio"].add_(1)
    assert not torch.allclose(quantizer(x), before)
    quantizer.cancel()
    assert torch.equal(quantizer(x), before)
    assert all(torch.equal(v, state[k]) for k, v in quantizer.state_dict().items())


def test_what_was_learned_is_what_it_is_afterwards() -> None:
    quantizer, x = ranged().at(20), normal(3, 6) * 3
    leaves = quantizer.begin()
    with torch.no_grad():
        leaves["log_ratio"].add_(0.3)
        leaves["zero_point"].add_(torch.tensor([[0.4], [-1.7], [2.6]]))
    learned = quantizer(x).detach()
    quantizer.end()
    assert torch.equal(quantizer(x), learned)
    assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())


@pytest.mark.parametrize("moved", [-100.0, 100.0])
def test_a_zero_point_never_leaves_the_grid(moved: float) -> None:
    quantizer, x = ranged().at(20), normal(3, 6) * 3
    with torch.no_grad():
        quantizer.begin()["zero_point"].add_(moved)
    learned = quantizer(x).detach()
    quantizer.end()
    assert quantizer.zero_point.unique().tolist() == [0 if moved < 0 else 15]
    assert torch.equal(quantizer(x), learned)


def slow_learned(x: Tensor, log_scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """In FP64 with straight-through rounding of codes and zero point, one range for all of x."""
    top, scale = 2**bits - 1, log_scale.exp()
    zero = zero_point + (zero_point.round().clamp(0, top) - zero_point).detach()
    return (round_through((x / scale + zero).clamp(0, top)) - zero) * scale


def test_gradients_equal_the_oracle_and_only_the_group_that_acts_gets_some() -> None:
    quantizer, x, weights = ranged().at(torch.tensor([950, 20])), normal(2, 50) * 3, normal(2, 50, seed=1)
    leaves = quantizer.begin()
    with torch.no_grad():
        leaves["zero_point"].add_(0.3)
    (quantizer(x) * weights).sum().backward()
    for item, group in enumerate((0, 2)):
        values = (quantizer.scale.log(), leaves["zero_point"].detach())
        slow = [value[group, 0].double().requires_grad_() for value in values]
        (slow_learned(x[item].double(), slow[0], slow[1], 4) * weights[item]).sum().backward()
        for name, leaf in zip(("log_ratio", "zero_point"), slow, strict=True):
            assert leaf.grad is not None
            found = leaves[name].grad
            assert found is not None
            assert leaf.grad.abs() > 1e-3
            torch.testing.assert_close(found[group, 0].double(), leaf.grad, rtol=1e-4, atol=1e-4)
            assert found[1].eq(0).all()


def test_learning_before_there_is_a_range_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"call initialize\(x\) before begin\(\)"):
        TimestepQuantizer(4).begin()


def test_a_copy_in_the_middle_of_learning_learns_on_its_own() -> None:
    quantizer, x = ranged().at(20), normal(3, 6)
    quantizer.begin()
    copied = copy.deepcopy(quantizer)
    with torch.no_grad():
        quantizer._leaves["log_ratio"].add_(1)  # type: ignore[index]
    copied.end()
    assert torch.equal(copied(x), ranged().at(20)(x))
    assert not torch.allclose(copied(x), quantizer(x).detach())


def test_its_grid_is_unsigned() -> None:
    assert TimestepQuantizer(3).grid == unsigned_grid(3)
