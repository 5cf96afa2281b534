import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.functional import decode, encode, min_max, mse_search, percentile, scale_and_zero_point

few = settings(deadline=None, max_examples=40)
values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40).map(torch.tensor)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_is_a_loop_over_channels(axis: int) -> None:
    x = normal(3, 4, 5)
    for low, high, one in (
        (*min_max(x, axis), min_max),
        (*percentile(x, 80.0, axis), lambda v: percentile(v, 80.0)),
        (*mse_search(x, 3, False, axis), lambda v: mse_search(v, 3, False)),
    ):
        assert low.shape == high.shape == (x.shape[axis],)
        for index in range(x.shape[axis]):
            expected_low, expected_high = one(x.select(axis, index))
            torch.testing.assert_close(low[index], expected_low)
            torch.testing.assert_close(high[index], expected_high)


@few
@given(values, st.floats(1, 100))
def test_percentile_equals_numpys_nearest_rank(x: Tensor, keep: float) -> None:
    low, high = percentile(x, keep)
    cut = int((1 - keep / 100) / 2 * len(x))
    ranks = np.sort(x.numpy())
    assert (low.item(), high.item()) == (ranks[cut], ranks[len(x) - 1 - cut])


@few
@given(values)
def test_percentile_100_is_min_max(x: Tensor) -> None:
    assert percentile(x, 100.0) == min_max(x) == (x.min(), x.max())


@pytest.mark.parametrize("keep", [0.0, -1.0, 100.1, float("nan")])
def test_a_percentage_out_of_range_is_refused_with_what_to_write(keep: float) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a percentage in \(0, 100\], for example 99.9"):
        percentile(torch.ones(3), keep)


@few
@given(values, st.sampled_from([2, 4, 8, 16]), st.booleans())
def test_the_grid_of_a_range_covers_it_and_holds_zero(x: Tensor, bits: int, symmetric: bool) -> None:
    x = x.double()
    scale, zero_point, grid = scale_and_zero_point(*min_max(x), bits, symmetric)
    assert (zero_point is None) == symmetric
    moved = decode(encode(x, scale, grid, zero_point), scale, zero_point)
    # The zero point is rounded, which moves both ends of the grid by up to half a step.
    assert ((moved - x).abs() <= scale * (0.5 if symmetric else 1.0) + 1e-9).all()
    zero = decode(encode(torch.zeros(1).double(), scale, grid, zero_point), scale, zero_point)
    assert zero.item() == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_without_width_can_be_divided_by(symmetric: bool) -> None:
    scale, zero_point, grid = scale_and_zero_point(torch.zeros(2), torch.zeros(2), 4, symmetric)
    codes = encode(torch.zeros(3, 2), scale, grid, zero_point)
    assert torch.equal(decode(codes, scale, zero_point), torch.zeros(3, 2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_searched_range_has_the_least_error_of_all_candidates(bits: int, symmetric: bool) -> None:
    x = normal(2000).double() ** 3

    def error(ratio: float, low: Tensor, high: Tensor) -> float:
        scale, zero_point, grid = scale_and_zero_point(low * ratio, high * ratio, bits, symmetric)
        return float((decode(encode(x, scale, grid, zero_point), scale, zero_point) - x).square().mean())

    found = error(1.0, *mse_search(x, bits, symmetric, candidates=40))
    candidates = [error(ratio / 40, *min_max(x)) for ratio in range(1, 41)]
    assert found == pytest.approx(min(candidates), rel=1e-5)
    assert bits == 8 or found < candidates[-1], "a tensor whose best range is min-max shows nothing"


@few
@given(values)
def test_the_order_of_the_values_does_not_matter(x: Tensor) -> None:
    for estimate in (min_max, lambda v: percentile(v, 70.0)):
        assert estimate(x.flip(0)) == estimate(x)
