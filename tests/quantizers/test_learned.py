import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from helpers.oracle import quantize_unsigned, quantize_weight
from lightning_quant.errors import CheckpointError
from lightning_quant.quantizers import LearnedQuantizer
from lightning_quant.quantizers.statistics import moments


def sample() -> Tensor:
    return torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("signed", [True, False])
def test_starts_at_three_standard_deviations(signed: bool) -> None:
    x = sample() if signed else sample().abs()
    quantizer = LearnedQuantizer(4)
    quantizer.initialize(x)
    assert quantizer.signed is signed
    factor = 1 if signed else math.sqrt(1 - 2 / math.pi)
    assert quantizer.range.item() == pytest.approx(3 * x.std(correction=0).item() / factor, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 3.0, -0.7, 1e-4])
def test_a_constant_tensor_is_representable(value: float) -> None:
    x = torch.full((1000,), value)
    quantizer = LearnedQuantizer(4)
    quantizer.initialize(x)
    torch.testing.assert_close(quantizer(x), x)


@pytest.mark.parametrize("sign", [1, -1])
def test_values_that_lie_close_together_far_from_zero_are_not_clipped(sign: int) -> None:
    x = sign * (5 + 0.1 * sample())
    quantizer = LearnedQuantizer(4)
    quantizer.initialize(x)
    assert quantizer.range.item() == pytest.approx(x.abs().max().item(), rel=1e-6)
    # An outlier does not take all codes.
    x[0] = 1000 * sign
    quantizer.initialize(x)
    assert quantizer.range.item() < 300


@pytest.mark.parametrize("signed", [True, False])
def test_the_sign_that_was_asked_for_is_kept(signed: bool) -> None:
    for x in (sample(), sample().abs()):
        quantizer = LearnedQuantizer(4, signed)
        quantizer.initialize(x)
        assert quantizer.signed is signed
    with pytest.raises(CheckpointError, match=f"write signed={signed}, or signed=None"):
        LearnedQuantizer(4, not signed).load_state_dict(quantizer.state_dict())


def test_the_sign_comes_with_the_state_where_it_was_left_open() -> None:
    quantizer, other = LearnedQuantizer(4), LearnedQuantizer(4)
    quantizer.initialize(sample().abs())
    other.load_state_dict(quantizer.state_dict())
    assert other.signed is False


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("start", [1.3, -1.3])
def test_values_and_gradients_equal_the_oracle(signed: bool, bits: int, start: float) -> None:
    quantizer = LearnedQuantizer(bits, signed)
    quantizer.range.data.fill_(start)
    quantizer.ready = True
    x = sample().requires_grad_()
    weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    (quantizer(x) * weights).sum().backward()
    y, bound = sample().requires_grad_(), quantizer.range.detach().double().requires_grad_()
    expected = (quantize_weight if signed else quantize_unsigned)(y, bound, bits)
    (expected * weights).sum().backward()
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad)
    assert quantizer.range.grad is not None
    assert bound.grad is not None
    assert quantizer.range.grad.item() == pytest.approx(bound.grad.item(), rel=1e-4)


def test_a_range_of_zero_gives_finite_values() -> None:
    quantizer = LearnedQuantizer(4, signed=True)
    quantizer.range.data.fill_(0.0)
    quantizer.ready = True
    assert quantizer(sample()).isfinite().all()


def test_moments_equal_torchs_and_do_not_depend_on_dtype_or_order() -> None:
    x = sample() * 3 + 100
    seen = moments(x)
    assert seen.std == pytest.approx(x.std(correction=0).item(), rel=1e-9)
    assert seen.largest == x.abs().max().item()
    assert not seen.has_negative
    assert moments(-x).has_negative
    assert moments(x.float()).std == pytest.approx(seen.std, rel=1e-6)


def test_an_empty_tensor_is_waited_out() -> None:
    quantizer = LearnedQuantizer(4)
    quantizer.initialize(torch.zeros(0, 3))
    assert not quantizer.ready


def test_copies_from_before_the_first_tensor_begin_with_its_range_and_sign() -> None:
    quantizer = LearnedQuantizer(4)
    average = pickle.loads(pickle.dumps(copy.deepcopy([quantizer, copy.deepcopy(quantizer)])))
    for first, second in (average, [quantizer, copy.deepcopy(quantizer)]):
        first.initialize(sample().abs())
        assert second.range.item() == first.range.item()
        assert second.signed is False
        second.refresh_ready()
        assert second.ready


def test_a_copy_that_sees_a_tensor_of_its_own_starts_from_that_one() -> None:
    quantizer = LearnedQuantizer(4)
    twin = copy.deepcopy(quantizer)
    quantizer.initialize(sample().abs())
    assert not twin.ready
    twin.initialize(10 * sample())
    assert twin.range.item() == pytest.approx(30 * sample().std(correction=0).item(), rel=1e-6)
    assert (quantizer.signed, twin.signed) == (False, True)
    assert quantizer.range.item() < 10


@pytest.mark.parametrize("signed", [None, True])
def test_a_copy_that_was_loaded_keeps_what_was_loaded(signed: bool | None) -> None:
    quantizer, other = LearnedQuantizer(4, signed), LearnedQuantizer(4, signed)
    twin = copy.deepcopy(quantizer)
    other.initialize(100 * sample())
    twin.load_state_dict(other.state_dict())
    quantizer.initialize(sample())
    assert twin.range.item() == other.range.item()


def test_copies_of_a_quantizer_that_has_a_range_are_on_their_own() -> None:
    quantizer = LearnedQuantizer(4)
    quantizer.initialize(sample())
    twin = copy.deepcopy(quantizer)
    twin.initialize(10 * sample().abs())
    assert (quantizer.signed, twin.signed) == (True, False)
    assert quantizer.range.item() < 10
