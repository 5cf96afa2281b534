import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.functional import rounding_noise
from lightning_quant.functional.rounding import from_fraction, hard_rounding, rounding_penalty, soft_rounding


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def round_stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = rounding_noise(x.numel(), generator).view(x.shape)
    return (x + noise.to(x.dtype)).round()


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


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    rounding_noise(10, generator())
    assert torch.equal(torch.get_rng_state(), before)


few = settings(deadline=None, max_examples=60)
alphas = st.lists(st.floats(-6, 6), min_size=1, max_size=20).map(lambda v: torch.tensor(v, dtype=torch.float64))
fractions = st.integers(0, 2**20 - 1).map(lambda n: torch.tensor(n / 2**20))


def slow_rounding(alpha: float) -> float:
    """Equation 23: clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1."""
    return min(max(1 / (1 + math.exp(-alpha)) * (1.1 - -0.1) - 0.1, 0.0), 1.0)


def slow_penalty(alpha: Tensor, beta: float) -> float:
    """Equation 24."""
    return math.fsum(1 - abs(2 * slow_rounding(a) - 1) ** beta for a in alpha.tolist())


@few
@given(alphas)
def test_soft_rounding_is_the_formula(alpha: Tensor) -> None:
    expected = torch.tensor([slow_rounding(a) for a in alpha.tolist()], dtype=torch.float64)
    torch.testing.assert_close(soft_rounding(alpha), expected, rtol=1e-12, atol=1e-12)


@few
@given(alphas)
def test_soft_rounding_is_symmetric_and_monotone(alpha: Tensor) -> None:
    torch.testing.assert_close(soft_rounding(-alpha), 1 - soft_rounding(alpha), rtol=0, atol=1e-12)
    assert (soft_rounding(alpha.sort().values).diff() >= 0).all()


@few
@given(alphas)
def test_hard_rounding_is_the_nearer_end_with_the_gradient_of_the_soft_one(alpha: Tensor) -> None:
    weights = torch.arange(1.0, len(alpha) + 1, dtype=torch.float64)
    gradients = []
    for rounding in (soft_rounding, hard_rounding):
        leaf = alpha.clone().requires_grad_()
        (rounding(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    hard = hard_rounding(alpha)
    assert torch.equal(hard, (alpha >= 0).double())
    away = (soft_rounding(alpha) - 0.5).abs() > 1e-12
    assert torch.equal(hard[away], soft_rounding(alpha)[away].round())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_rounding_is_exactly_0_or_1(dtype: torch.dtype) -> None:
    alpha = torch.linspace(-5, 5, 10001, dtype=dtype).requires_grad_()
    assert set(hard_rounding(alpha).tolist()) == {0.0, 1.0}


def test_the_gradient_is_0_where_the_sigmoid_is_cut_off() -> None:
    alpha = torch.tensor([-3.0, -1.0, 1.0, 3.0], requires_grad=True)
    hard_rounding(alpha).sum().backward()
    assert alpha.grad is not None
    assert (alpha.grad != 0).tolist() == [False, True, True, False]


@few
@given(fractions)
def test_from_fraction_inverts_soft_rounding_and_its_sign_is_the_nearest(fraction: Tensor) -> None:
    alpha = from_fraction(fraction)
    torch.testing.assert_close(soft_rounding(alpha), fraction, rtol=0, atol=1e-6)
    assert bool(alpha >= 0) == bool(fraction >= 0.5)


def test_one_half_and_its_neighbours_round_to_their_sides() -> None:
    half = torch.tensor(0.5)
    below, above = torch.nextafter(half, half * 0), torch.nextafter(half, half * 2)
    assert hard_rounding(from_fraction(torch.stack([half, above]))).tolist() == [1.0, 1.0]
    assert float(from_fraction(below)) <= float(from_fraction(half))


@few
@given(alphas, st.floats(1, 20))
def test_the_penalty_is_the_formula(alpha: Tensor, beta: float) -> None:
    assert float(rounding_penalty(alpha, beta)) == pytest.approx(slow_penalty(alpha, beta), abs=1e-9)


def test_the_penalty_is_0_for_what_is_decided_and_weighs_more_with_less_beta() -> None:
    decided, open_ones = torch.tensor([-4.0, 4.0, 9.0]), torch.tensor([-1.0, 0.3])
    assert float(rounding_penalty(decided, 2.0)) == 0
    penalties = [float(rounding_penalty(open_ones, beta)) for beta in (2.0, 8.0, 20.0)]
    assert penalties[0] < penalties[1] < penalties[2] <= 2


@pytest.mark.parametrize("beta", [2.0, 8.0])
def test_the_penalty_pushes_away_from_the_middle(beta: float) -> None:
    alpha = torch.tensor([-0.8, 0.8], requires_grad=True)
    rounding_penalty(alpha, beta).backward()  # type: ignore[no-untyped-call]
    assert alpha.grad is not None
    assert alpha.grad[0] > 0 > alpha.grad[1]
