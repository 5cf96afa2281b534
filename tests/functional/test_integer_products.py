import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.functional import Grid, symmetric_grid, unsigned_grid
from lightning_quant.functional.integer_products import (
    IntegerConvolution,
    IntegerLinear,
    fits_int8,
    integer_matmul,
)
from lightning_quant.functional.products import ConvolutionProduct, LinearProduct

few = settings(deadline=None, max_examples=30)


def codes(*shape: int, high: int = 127, seed: int = 0) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def test_grids_that_fit_int8() -> None:
    for bits in range(2, 17):
        assert fits_int8(symmetric_grid(bits)) == (bits <= 8)
        assert fits_int8(unsigned_grid(bits)) == (bits <= 7)
    assert not fits_int8(Grid(-129, 0))


@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_matmul_is_exact_for_any_shape(m: int, k: int, n: int, seed: int) -> None:
    a, b = codes(m, k, seed=seed), codes(k, n, seed=seed + 1)
    result = integer_matmul(a.to(torch.int8), b.to(torch.int8))
    assert torch.equal(result.long(), a @ b)


def test_matmul_takes_transposed_operands() -> None:
    a, b = codes(9, 5).to(torch.int8), codes(7, 9).to(torch.int8)
    assert torch.equal(integer_matmul(a.t(), b.t()).long(), a.t().long() @ b.t().long())


def test_sums_beyond_int32_do_not_overflow() -> None:
    depth = 2**31 // 127**2 + 1000
    a, b = torch.full((1, depth), 127, dtype=torch.int8), torch.full((depth, 1), 127, dtype=torch.int8)
    assert integer_matmul(a, b).item() == depth * 127**2 > 2**31 - 1


@few
@given(st.integers(1, 30), st.sampled_from([100, 1000, 10**6, 2**31]))
def test_splitting_the_sum_does_not_change_it(k: int, largest: int) -> None:
    a, b = codes(3, k, high=10), codes(k, 4, high=10, seed=1)
    # As if products could be so large that int32 holds only a few of them.
    assert torch.equal(integer_matmul(a.to(torch.int8), b.to(torch.int8), largest).long(), a @ b)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
@pytest.mark.parametrize("high", [7, 127])
def test_linear_equals_the_simulated_one_in_all_three_products(shape: tuple[int, ...], high: int) -> None:
    x, w = codes(*shape, high=high).double(), codes(4, 6, high=high, seed=1).double()
    g = codes(*shape[:-1], 4, high=high, seed=2).double()
    integer, simulated = IntegerLinear(), LinearProduct()
    assert torch.equal(integer(x, w).double(), simulated(x, w))
    assert torch.equal(integer.input_gradient(g, w, x.shape).double(), simulated.input_gradient(g, w, x.shape))
    assert torch.equal(integer.weight_gradient(g, x, w.shape).double(), simulated.weight_gradient(g, x, w.shape))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "stride", "padding", "dilation"),
    [
        ((2, 3, 9), (4, 3, 3), (2,), (1,), (1,)),
        ((2, 3, 9, 8), (4, 3, 3, 2), (1, 1), (0, 0), (1, 1)),
        ((2, 3, 9, 8), (4, 3, 3, 2), (2, 3), (1, 2), (2, 1)),
        ((1, 3, 10, 10), (2, 3, 3, 3), (4, 4), (0, 0), (1, 1)),
        ((2, 3, 5, 5), (4, 3, 1, 1), (2, 2), (0, 0), (1, 1)),
        ((1, 2, 4, 5, 4), (3, 2, 2, 2, 2), (1, 2, 1), (0, 1, 0), (1, 1, 1)),
    ],
)
def test_convolution_equals_the_simulated_one_in_all_three_products(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> None:
    arguments = (stride, padding, dilation, False, (0,) * len(stride))
    integer, simulated = IntegerConvolution(*arguments), ConvolutionProduct(*arguments)
    x, w = codes(*x_shape).double(), codes(*w_shape, seed=1).double()
    y = simulated(x, w)
    g = codes(*y.shape, seed=2).double()
    assert torch.equal(integer(x, w).double(), y)
    assert torch.equal(integer.input_gradient(g, w, x.shape).double(), simulated.input_gradient(g, w, x.shape))
    assert torch.equal(integer.weight_gradient(g, x, w.shape).double(), simulated.weight_gradient(g, x, w.shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_no_integer_can_say_makes_the_result_nan(value: float) -> None:
    x, w, g = torch.ones(2, 6), torch.ones(4, 6), torch.ones(2, 4)
    bad_x, bad_w, bad_g = x.clone(), w.clone(), g.clone()
    bad_x[0, 0] = bad_w[0, 0] = bad_g[0, 0] = value
    product = IntegerLinear()
    for result in (
        product(bad_x, w),
        product(x, bad_w),
        product.input_gradient(bad_g, w, x.shape),
        product.weight_gradient(bad_g, x, w.shape),
    ):
        assert result.isnan().all()
    convolution = IntegerConvolution((1, 1), (0, 0), (1, 1))
    images, kernel = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)
    images[0, 0, 0, 0] = value
    assert convolution(images, kernel).isnan().all()
    assert convolution.input_gradient(images, kernel, images.shape).isnan().all()
    assert convolution.weight_gradient(images, torch.ones_like(images), kernel.shape).isnan().all()
