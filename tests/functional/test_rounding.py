import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_quant.functional import round_stochastic, rounding_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 300), st.integers(0, 1000))
def test_noise_is_within_half_a_step_and_repeatable(count: int, seed: int) -> None:
    noise = rounding_noise(count, generator(seed))
    assert noise.shape == (count,)
    assert (noise.abs() < 0.5).all()
    assert torch.equal(noise, rounding_noise(count, generator(seed)))


def test_noise_is_uniform() -> None:
    noise = rounding_noise(200_000, generator()).double()
    counts = torch.histc(noise.float(), 20, -0.5, 0.5)
    # Chi square of 19 degrees of freedom: 43.8 is its 0.999 quantile.
    assert ((counts - 10_000).square() / 10_000).sum() < 43.8
    assert abs(noise.mean()) < 4 * (1 / 12 / len(noise)) ** 0.5
    assert abs(noise.var() - 1 / 12) < 4 * (1 / 180 / len(noise)) ** 0.5


def test_the_four_values_of_a_draw_do_not_follow_each_other() -> None:
    noise = rounding_noise(200_000, generator()).view(-1, 4).T
    correlation = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlation.abs().max() < 4 / 50_000**0.5


def test_noise_never_moves_a_whole_number() -> None:
    x = torch.arange(-127.0, 128.0).repeat(2000)
    assert torch.equal(round_stochastic(x, generator()), x)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("sign", [1, -1])
def test_expectation_is_the_value(fraction: float, sign: int) -> None:
    count = 100_000
    rounded = round_stochastic(torch.full((count,), sign * fraction), generator(3)).double()
    assert set(rounded.abs().tolist()) == {0, 1}
    assert abs(rounded.mean() - sign * fraction) < 4 * (fraction * (1 - fraction) / count) ** 0.5


def test_shape_and_dtype_are_kept() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.zeros(3, 0, 5, dtype=dtype)
        assert round_stochastic(x, generator()).dtype == dtype
        assert round_stochastic(x, generator()).shape == x.shape


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    round_stochastic(torch.randn(10, generator=generator()), generator())
    assert torch.equal(torch.get_rng_state(), before)
