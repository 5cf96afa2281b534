import pytest
import torch
from torch import Tensor

from lightning_quant.functional import Grid, encode, fake_quantize, symmetric_grid, unsigned_grid
from lightning_quant.functional.clamp_gradient import quantized_backward
from lightning_quant.functional.compression import pack

LARGE = 2**17 + 5  # more than one block


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [symmetric_grid(4), unsigned_grid(4), symmetric_grid(8), unsigned_grid(2)])
@pytest.mark.parametrize("shape", [(7, 11), (LARGE,), (2, 3, 4, 5)])
def test_equals_the_straight_through_gradient(grid: Grid, shape: tuple[int, ...]) -> None:
    x, grad, scale = normal(*shape), normal(*shape, seed=1), torch.tensor(0.11)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, scale, grid).backward(grad)
    result = quantized_backward(grad.clone(), x, scale, grid, packed=False)
    assert leaf.grad is not None
    assert torch.equal(result.grad, leaf.grad)
    assert torch.equal(result.codes, encode(x, scale, grid))
    torch.testing.assert_close(result.inner.double(), (leaf.grad.double() * x.double()).sum(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("grid", [symmetric_grid(4), unsigned_grid(4), symmetric_grid(8)])
def test_packed_differs_only_in_the_residual(grid: Grid) -> None:
    x, grad, scale = normal(50, 60), normal(50, 60, seed=1), torch.tensor(0.11)
    exact = quantized_backward(grad.clone(), x, scale, grid, packed=False)
    kept = pack(x, encode(x, scale, grid), scale, grid)
    result = quantized_backward(grad.clone(), kept, scale, grid, packed=True)
    assert torch.equal(result.grad, exact.grad)
    assert torch.equal(result.codes, exact.codes)
    levels = 16 if grid.high - grid.low < 16 else 128
    bound = exact.grad.abs().sum() * scale * 0.5 / levels
    assert (result.inner - exact.inner).abs() <= bound * 1.01


def test_the_factor_multiplies_the_gradient_first() -> None:
    x, grad, scale, grid = normal(100), normal(100, seed=1), torch.tensor(0.2), symmetric_grid(4)
    plain = quantized_backward(grad * 0.5, x, scale, grid, packed=False)
    scaled = quantized_backward(grad.clone(), x, scale, grid, packed=False, factor=torch.tensor(0.5))
    assert torch.equal(plain.grad, scaled.grad)
    assert torch.equal(plain.inner, scaled.inner)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "bfloat16"])
def test_layout_and_dtype_of_the_gradient_do_not_matter(layout: str) -> None:
    x, scale, grid = normal(6, 8), torch.tensor(0.2), symmetric_grid(4)
    base = normal(16, 16, seed=1).bfloat16().float()
    grad = {
        "transposed": base[:8, :6].t(),
        "strided": base[:12:2, ::2],
        "expanded": base[:1, :8].expand(6, 8),
        "bfloat16": base[:6, :8].bfloat16(),
    }[layout]
    expected = quantized_backward(grad.float().contiguous().clone(), x, scale, grid, packed=False)
    result = quantized_backward(grad, x, scale, grid, packed=False)
    assert torch.equal(result.grad, expected.grad)
    torch.testing.assert_close(result.inner, expected.inner)


def test_the_ends_of_the_range_let_gradients_through_and_what_lies_beyond_does_not() -> None:
    x = torch.tensor([-7.01, -7.0, 0.0, 7.0, 7.01])
    result = quantized_backward(torch.ones(5), x, torch.tensor(1.0), symmetric_grid(4), packed=False)
    assert result.grad.tolist() == [0, 1, 1, 1, 0]
