import pytest
import torch
from torch import Tensor

from helpers.oracle import quantize_gradient
from lightning_quant.errors import QuantizationError
from lightning_quant.gradient import FixedInterval, IntervalStrategy, LargeGradientInterval, MinMaxInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.gradient.quantizer import GradientQuantizer, gradient_errors


def make(bits: int = 4, interval: IntervalStrategy | None = None, seed: int = 0) -> GradientQuantizer:
    quantizer = GradientQuantizer(bits, interval or FixedInterval(0.5))
    quantizer.run.noise = NoiseSource(seed)
    return quantizer


def real(quantizer: GradientQuantizer, gradient: Tensor) -> Tensor:
    codes = quantizer.quantize(gradient)
    assert codes.scale is not None
    return codes.values * codes.scale


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) ** 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_equals_the_oracle(bits: int, gamma: float) -> None:
    gradient = sample(4, 5, 6)
    noise = NoiseSource(0).draw(gradient.numel(), gradient.device).view(gradient.shape)
    expected = quantize_gradient(gradient.double(), gamma, bits, noise.double())
    torch.testing.assert_close(real(make(bits, FixedInterval(gamma)), gradient).double(), expected)


def test_expectation_is_the_gradient_inside_the_interval_and_the_bound_outside() -> None:
    gradient = torch.tensor([0.01, -0.3, 0.42, 1.0, -1.0])
    quantizer = make(interval=FixedInterval(0.5))
    assert quantizer.run.noise is not None
    total = torch.zeros(5).double()
    for batch in range(4000):
        quantizer.run.noise.restart(batch)
        total += real(quantizer, gradient)
    expected = gradient.clamp(-0.5, 0.5).double()
    width = 0.5 / 7
    torch.testing.assert_close(total / 4000, expected, atol=4 * width / 2 / 4000**0.5, rtol=0)


def test_codes_stay_on_the_grid_and_zero_stays_zero() -> None:
    gradient = torch.cat([sample(10_000), torch.zeros(5000)])
    codes = make(interval=FixedInterval(0.1)).quantize(gradient).values
    assert codes.abs().max() == 7
    assert torch.equal(codes, codes.round())
    assert not codes[10_000:].any()


@pytest.mark.parametrize("power", [-20, 3, 30])
def test_a_power_of_two_leaves_codes_and_gamma_unchanged(power: int) -> None:
    gradient = sample(5000)
    a, b = make(interval=LargeGradientInterval(0.05)), make(interval=LargeGradientInterval(0.05))
    assert torch.equal(a.quantize(gradient).values, b.quantize(gradient * 2.0**power).values)
    assert torch.equal(a.gamma, b.gamma)
    assert a.run.clipped == b.run.clipped


def test_the_gradient_is_not_written_to() -> None:
    gradient = sample(3, 4)
    before = gradient.clone()
    make(interval=LargeGradientInterval()).quantize(gradient)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_passes_through_and_counts_for_nothing(bad: float) -> None:
    quantizer = make(interval=LargeGradientInterval(0.1))
    broken = torch.tensor([0.123, bad, -0.7])
    torch.testing.assert_close(real(quantizer, broken), broken, rtol=0, atol=0, equal_nan=True)
    assert not quantizer.ready
    quantizer.quantize(sample(100))
    gamma, clipped, total = quantizer.gamma.clone(), quantizer.run.clipped, quantizer.run.total
    torch.testing.assert_close(real(quantizer, broken), broken, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(quantizer.gamma, gamma)
    assert (quantizer.run.clipped, quantizer.run.total) == (clipped, total)


def test_an_all_zero_gradient_gives_zeros_and_starts_nothing() -> None:
    quantizer = make(interval=LargeGradientInterval())
    assert not real(quantizer, torch.zeros(3, 3)).any()
    assert not quantizer.ready


def test_an_empty_gradient_passes() -> None:
    assert make().quantize(torch.zeros(0, 3)).values.shape == (0, 3)


def test_counting_is_strict_and_adds_up() -> None:
    quantizer = make(interval=LargeGradientInterval())
    gradient = torch.tensor([1.0, 0.5, 0.5, 0.25])
    quantizer.quantize(gradient)
    quantizer.gamma.fill_(0.5)
    quantizer.run.clipped = quantizer.run.total = None
    quantizer.quantize(gradient)
    quantizer.quantize(gradient)
    assert quantizer.run.clipped is not None
    assert (float(quantizer.run.clipped), float(quantizer.run.total or 0)) == (2.0, 8.0)


def test_memory_order_does_not_matter() -> None:
    gradient = sample(2, 8, 5, 5)
    last = gradient.to(memory_format=torch.channels_last)
    a, b = make(interval=MinMaxInterval()), make(interval=MinMaxInterval())
    for quantizer in (a, b):
        assert quantizer.run.noise is not None
    x, y = a.quantize(gradient), b.quantize(last)
    assert y.values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.scale, y.scale)  # type: ignore[arg-type]
    assert (x.values - y.values).abs().max() <= 1


def test_an_expanded_gradient_is_rounded_value_by_value() -> None:
    codes = make(interval=FixedInterval(1.0)).quantize(torch.full((1, 1), 0.35).expand(50, 50) * 1.0)
    expanded = make(interval=FixedInterval(0.5))
    expanded.initialize(torch.ones(1))
    values = expanded.quantize(torch.tensor([[0.3]]).expand(50, 50)).values
    assert codes.values.shape == values.shape == (50, 50)


def test_training_without_the_callback_says_what_to_add() -> None:
    with pytest.raises(QuantizationError, match=r"add lightning_quant\.GradientQuantization"):
        GradientQuantizer(4, MinMaxInterval()).quantize(torch.ones(2))


def test_bfloat16_gradients_get_the_codes_of_their_values_in_fp32() -> None:
    gradient = sample(1000).bfloat16()
    assert torch.equal(make().quantize(gradient).values, make().quantize(gradient.float()).values)


def test_errors_equal_their_definitions() -> None:
    gradient = sample(1000)
    quantizer = make(interval=FixedInterval(0.4))
    codes = quantizer.quantize(gradient)
    assert codes.scale is not None
    found = gradient_errors(gradient, codes.values, codes.scale, quantizer.gamma, alpha=0.01)
    error = (gradient - codes.values * codes.scale).abs() / gradient.abs().max()
    largest = gradient.abs().sort(descending=True).indices[:10]
    assert float(found.all) == pytest.approx(float(error.mean()), rel=1e-5)
    assert float(found.large) == pytest.approx(float(error[largest].mean()), rel=1e-5)
    clipped = (gradient.abs() > 0.4 * gradient.abs().max()).float().mean()
    assert float(found.clipped) == pytest.approx(float(clipped))
    assert float(found.zero) == pytest.approx(float((codes.values == 0).float().mean()))


def test_denormal_gradients_pass_through() -> None:
    gradient = torch.tensor([0.0, 3e-45, -3e-45])
    assert torch.equal(real(make(interval=MinMaxInterval()), gradient), gradient)
