from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.functional.products import ConvolutionProduct, LinearProduct, Product

CASES: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (LinearProduct(), (5, 6), (4, 6)),
    "linear of a sequence": (LinearProduct(), (2, 3, 5, 6), (4, 6)),
    "linear of a vector": (LinearProduct(), (6,), (4, 6)),
    "conv1d": (ConvolutionProduct((2,), (1,), (1,), False, (0,)), (2, 3, 9), (4, 3, 3)),
    "conv2d": (ConvolutionProduct((2, 1), (1, 2), (1, 2)), (2, 3, 9, 8), (4, 3, 3, 2)),
    "grouped": (ConvolutionProduct((1, 1), (1, 1), (1, 1), groups=3), (2, 3, 6, 6), (6, 1, 3, 3)),
    "conv3d": (ConvolutionProduct((1, 2, 1), (0, 1, 0), (1, 1, 1), False, (0, 0, 0)), (1, 2, 4, 5, 4), (3, 2, 2, 2, 2)),
    "transposed": (ConvolutionProduct((2, 2), (1, 1), (1, 1), True, (1, 0)), (2, 3, 5, 5), (3, 4, 3, 3)),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_backward_products_are_the_adjoints_of_the_forward_one(name: str) -> None:
    """<g, x * w> = <gx, x> = <gw, w> for every g: what the range gradients rest on."""
    product, x_shape, w_shape = CASES[name]
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    y = product(x, w)
    g = normal(*y.shape, seed=2)
    gx, gw = product.input_gradient(g, w, x.shape), product.weight_gradient(g, x, w.shape)
    assert (gx.shape, gw.shape) == (x.shape, w.shape)
    torch.testing.assert_close((gx * x).sum(), (g * y).sum())
    torch.testing.assert_close((gw * w).sum(), (g * y).sum())


@pytest.mark.parametrize("name", CASES)
def test_equals_autograd_of_pytorchs_own_layer(name: str) -> None:
    product, x_shape, w_shape = CASES[name]
    x, w = normal(*x_shape).requires_grad_(), normal(*w_shape, seed=1).requires_grad_()
    match product:
        case LinearProduct():
            y = F.linear(x, w)
        case ConvolutionProduct(stride, padding, dilation, True, extra, groups):
            y = F.conv_transpose2d(x, w, None, stride, padding, extra, groups, dilation)
        case ConvolutionProduct(stride, padding, dilation, groups=groups):
            kinds: list[Any] = [F.conv1d, F.conv2d, F.conv3d]
            y = kinds[len(stride) - 1](x, w, None, stride, padding, dilation, groups)
    g = normal(*y.shape, seed=2)
    y.backward(g)
    torch.testing.assert_close(product(x.detach(), w.detach()), y.detach())
    torch.testing.assert_close(product.input_gradient(g, w.detach(), x.shape), x.grad)
    torch.testing.assert_close(product.weight_gradient(g, x.detach(), w.shape), w.grad)


@pytest.mark.parametrize("name", CASES)
def test_the_channel_axis_is_that_of_the_bias(name: str) -> None:
    product, x_shape, w_shape = CASES[name]
    y = product(normal(*x_shape), normal(*w_shape))
    out = w_shape[1] if name == "transposed" else w_shape[0]
    assert y.shape[product.channel_axis] == out
