import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.functional import decode, encode, fake_quantize, min_max, scale_and_zero_point
from lightning_quant.quantizers import FixedQuantizer
from lightning_quant.quantizers.base import quantizer_of_state


def sample() -> Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_functions(symmetric: bool) -> None:
    quantizer = FixedQuantizer(4, symmetric)
    quantizer.initialize(sample())
    scale, zero_point, grid = scale_and_zero_point(*min_max(sample()), 4, symmetric)
    assert quantizer.grid == grid
    assert torch.equal(quantizer(sample()), fake_quantize(sample(), scale, grid, zero_point))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_is_a_loop_over_channels(symmetric: bool, axis: int) -> None:
    quantizer = FixedQuantizer(4, symmetric, axis)
    quantizer.initialize(sample())
    for whole, part in zip(quantizer(sample()).unbind(axis), sample().unbind(axis), strict=True):
        one = FixedQuantizer(4, symmetric)
        one.initialize(part)
        assert torch.equal(whole, one(part))


def test_a_channel_of_zeros_does_not_disturb_the_others() -> None:
    x = sample()
    x[1] = 0
    quantizer = FixedQuantizer(8, axis=0)
    quantizer.initialize(x)
    assert torch.equal(quantizer(x)[1], x[1])
    torch.testing.assert_close(quantizer(x), x, atol=0.02, rtol=0)


@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_that_is_not_there_is_refused(axis: int) -> None:
    with pytest.raises(ConfigurationError, match=f"axis={axis}: the tensor has 3 dimensions"):
        FixedQuantizer(4, axis=axis).initialize(sample())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_state_with_and_one_without_zero_point_do_not_mix(symmetric: bool) -> None:
    quantizer = FixedQuantizer(4, symmetric)
    quantizer.initialize(sample())
    with pytest.raises(CheckpointError, match=f"write symmetric={symmetric}"):
        FixedQuantizer(4, not symmetric).load_state_dict(quantizer.state_dict())


@pytest.mark.parametrize("axis", [None, 0, 1, -1, -3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_state_says_axis_and_symmetry(axis: int | None, symmetric: bool) -> None:
    made = quantizer_of_state(FixedQuantizer(5, symmetric, axis).get_extra_state())
    assert isinstance(made, FixedQuantizer)
    assert (made.bits, made.symmetric, made.axis) == (5, symmetric, axis)


@pytest.mark.parametrize(("ours", "theirs"), [(None, 0), (0, 1), (1, None)])
def test_states_of_other_axes_do_not_mix(ours: int | None, theirs: int | None) -> None:
    with pytest.raises(CheckpointError, match=f"has axis={theirs} .* with axis={ours}: write axis={theirs}"):
        FixedQuantizer(4, axis=ours).load_state_dict(FixedQuantizer(4, axis=theirs).state_dict())


@given(
    bits=st.integers(2, 12),
    low=st.floats(-100, 100, width=32),
    width=st.floats(0.0009765625, 100, width=32),
    spread=st.floats(0.5, 3),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=200)
def test_codes_of_what_codes_stand_for_are_the_codes(
    bits: int, low: float, width: float, spread: float, seed: int
) -> None:
    """Whatever the range: for a one-signed one the code of 0 lies outside the grid."""
    # Beyond 2^24 FP32 has no room for a code beside its zero point.
    assume(abs(low) / width * 2**bits < 2**22)
    quantizer = FixedQuantizer(bits, symmetric=False, axis=0)
    lows = torch.tensor([low, -low, low / 2])
    quantizer.scale = torch.full((3,), width) / quantizer.grid.high
    quantizer.zero_point = (-lows / quantizer.scale).round()
    quantizer.ready = True
    scale, zero_point = quantizer.affine(2)
    noise = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    codes = encode(lows[:, None] + spread * width * noise, scale, quantizer.grid, zero_point)
    real = decode(codes, scale, zero_point)
    assert torch.equal(encode(real, scale, quantizer.grid, zero_point), codes)
    assert torch.equal(quantizer(real), real)


def test_a_weight_that_is_written_to_in_any_way_is_quantized_anew() -> None:
    weight = torch.nn.Parameter(sample())
    quantizer = FixedQuantizer(4, axis=0)
    quantizer.initialize(weight)

    def is_current() -> bool:
        with torch.no_grad():
            return torch.equal(quantizer(weight), quantizer(weight.detach().clone()))

    assert is_current()
    weight.data.mul_(0.5)
    assert is_current()
    with torch.no_grad():
        weight.mul_(0.5)
    assert is_current()
    weight.data = weight.data.clone() * 0.5
    assert is_current()
    quantizer.scale.data.mul_(0.5)
    quantizer.eval()
    assert is_current()
