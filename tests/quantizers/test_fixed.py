import pytest
import torch
from torch import Tensor

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.functional import fake_quantize, min_max, scale_and_zero_point
from lightning_quant.quantizers import FixedQuantizer


def sample() -> Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_functions(symmetric: bool) -> None:
    quantizer = FixedQuantizer(4, symmetric)
    quantizer.initialise(sample())
    scale, zero_point, grid = scale_and_zero_point(*min_max(sample()), 4, symmetric)
    assert quantizer.grid == grid
    assert torch.equal(quantizer(sample()), fake_quantize(sample(), scale, grid, zero_point))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_is_a_loop_over_channels(symmetric: bool, axis: int) -> None:
    quantizer = FixedQuantizer(4, symmetric, axis)
    quantizer.initialise(sample())
    for whole, part in zip(quantizer(sample()).unbind(axis), sample().unbind(axis), strict=True):
        one = FixedQuantizer(4, symmetric)
        one.initialise(part)
        assert torch.equal(whole, one(part))


def test_a_channel_of_zeros_does_not_disturb_the_others() -> None:
    x = sample()
    x[1] = 0
    quantizer = FixedQuantizer(8, axis=0)
    quantizer.initialise(x)
    assert torch.equal(quantizer(x)[1], x[1])
    torch.testing.assert_close(quantizer(x), x, atol=0.02, rtol=0)


@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_that_is_not_there_is_refused(axis: int) -> None:
    with pytest.raises(ConfigurationError, match=f"axis={axis}: the tensor has 3 dimensions"):
        FixedQuantizer(4, axis=axis).initialise(sample())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_state_with_and_one_without_zero_point_do_not_mix(symmetric: bool) -> None:
    quantizer = FixedQuantizer(4, symmetric)
    quantizer.initialise(sample())
    with pytest.raises(CheckpointError, match=f"write symmetric={symmetric}"):
        FixedQuantizer(4, not symmetric).load_state_dict(quantizer.state_dict())
