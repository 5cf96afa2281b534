import pytest
import torch

from lightning_quant.errors import ConfigurationError
from lightning_quant.gradient import FixedInterval, LargeGradientInterval, MinimumErrorInterval, MinMaxInterval


def heavy_tail(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).abs() ** 3


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("alpha", [1e-3, 0.05, 1.0])
def test_large_gradients_start_at_the_exact_quantile(bits: int, alpha: float) -> None:
    magnitude = heavy_tail(200_000)
    gamma = LargeGradientInterval(alpha).start(magnitude, bits)
    above = int((magnitude > gamma * magnitude.max() * (1 + 1e-6)).sum())
    assert above == int(alpha / (2**bits - 1) * magnitude.numel())


@pytest.mark.parametrize("start", [0.01, 0.5, 1.0])
def test_on_a_static_tensor_gamma_converges_to_the_quantile(start: float) -> None:
    strategy = LargeGradientInterval(alpha=0.01, step=1e-3)
    magnitude = heavy_tail(100_000)
    target = torch.tensor([strategy.target(4)])
    gamma = torch.tensor([start])
    for _ in range(1000):
        clipped = (magnitude > gamma * magnitude.max()).float().mean()[None]
        gamma = strategy.step(gamma, clipped, target)
    quantile = strategy.start(magnitude, 4)
    assert abs(float(gamma - quantile)) <= 1e-3 + 1e-6


def test_the_target_is_where_the_bound_on_the_large_error_is_flat() -> None:
    alpha, bits = 0.001, 4
    share = LargeGradientInterval(alpha).target(bits)

    def bound(gamma: float) -> float:
        levels: int = 2**bits - 2
        return ((alpha - share) * gamma / levels + share * (1 - gamma)) / alpha

    assert bound(0.3) == pytest.approx(bound(0.9), rel=1e-12)


def test_a_small_tensor_is_not_clipped() -> None:
    assert float(LargeGradientInterval().start(heavy_tail(10_000), 4)) == 1.0


def test_gamma_stays_between_its_bounds() -> None:
    strategy = LargeGradientInterval(step=0.5)
    target = torch.tensor([0.1, 0.1])
    moved = strategy.step(torch.tensor([0.002, 0.999]), torch.tensor([0.0, 1.0]), target)
    assert moved.tolist() == pytest.approx([0.001, 1.0])


def test_constant_strategies_do_not_move() -> None:
    gamma, share = torch.tensor([1.0]), torch.tensor([0.5])
    for strategy, ratio in ((MinMaxInterval(), 1.0), (FixedInterval(0.6), 0.6)):
        assert float(strategy.start(heavy_tail(10), 4)) == pytest.approx(ratio)
        assert strategy.step(gamma, share, share) is gamma


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_minimum_error_finds_the_least_cosine_distance(bits: int) -> None:
    gradient = heavy_tail(3000).double() * torch.tensor([1.0, -1.0]).double().repeat(1500)
    strategy = MinimumErrorInterval(candidates=20)
    levels = 2 ** (bits - 1) - 1
    cosines = []
    for i in range(1, 21):
        width = i / 20 * gradient.abs().max() / levels
        position = (gradient / width).clamp(-levels, levels)
        fraction = position - position.floor()
        expected = position * width
        square = expected.square() + width**2 * fraction * (1 - fraction)
        cosines.append(float((gradient * expected).sum() / square.sum().sqrt()))
    best = 1 + max(range(20), key=cosines.__getitem__)
    assert round(float(strategy.start(gradient.abs().float(), bits)) * 20) == best


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LargeGradientInterval(alpha=0), "alpha=0: the share of large gradients lies in"),
        (lambda: LargeGradientInterval(alpha=1.5), "alpha=1.5"),
        (lambda: LargeGradientInterval(step=0), "step=0: gamma lies in"),
        (lambda: LargeGradientInterval(step=1.0), "step=1.0"),
        (lambda: FixedInterval(0.0), "ratio=0.0: expected a share"),
        (lambda: FixedInterval(1.2), "ratio=1.2"),
        (lambda: MinimumErrorInterval(every=0), "every=0"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()  # type: ignore[operator]
