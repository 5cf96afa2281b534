"""Products of :mod:`lightning_quant.functional.products` on int8 codes, with int8 matrix units and int32 accumulation.

4-bit codes in int8 give exactly the INT4 result. Stock PyTorch has no INT4 product, so 4 bits are no faster than 8
here: the point is to show that integer hardware computes what was simulated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.functional.grid import Grid
from lightning_quant.functional.products import ConvolutionProduct, LinearProduct

_INT32_MAX = 2**31 - 1
_INT8 = Grid(-128, 127)
LARGEST_CODE = 127


def fits_int8(grid: Grid) -> bool:
    """Return whether int8 holds every code of the grid: signed codes up to 8 bits, unsigned codes up to 7.

    Example:
        >>> fits_int8(Grid(-127, 127)), fits_int8(Grid(0, 255))
        (True, False)
    """
    return grid.low >= _INT8.low and grid.high <= _INT8.high


def integer_matmul(a: Tensor, b: Tensor, largest: int = LARGEST_CODE**2) -> Tensor:
    """Multiply int8 matrices (M, K) and (K, N) exactly. The result is int32, or int64 where int32 could overflow.

    Args:
        a: Matrix of shape (M, K), int8.
        b: Matrix of shape (K, N), int8.
        largest: Largest absolute value of a product of two elements. Decides how many are added in int32.

    Example:
        >>> integer_matmul(torch.full((2, 3), 7, dtype=torch.int8), torch.full((3, 2), -7, dtype=torch.int8))
        tensor([[-147, -147],
                [-147, -147]], dtype=torch.int32)
    """
    depth = max(1, _INT32_MAX // largest)
    if a.shape[1] <= depth:
        return _int_mm(a, b)
    parts = zip(torch.split(a, depth, 1), torch.split(b, depth, 0), strict=True)
    return torch.stack([_int_mm(x, y).long() for x, y in parts]).sum(0)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    if a.is_cuda:
        # cuBLASLt needs more than 16 rows, K and N in multiples of 8, and a column-major second operand.
        a = F.pad(a, (0, -k % 8, 0, max(-m % 8, 24 - m)))
        b = F.pad(b, (0, -n % 8, 0, -k % 8)).t().contiguous().t()
    return torch._int_mm(a.contiguous(), b if a.is_cuda else b.contiguous())[:m, :n]


def _codes(x: Tensor) -> Tensor:
    return x.to(torch.int8)


def _rows(grad: Tensor) -> Tensor:
    """Reshape (N, channels, ...) to int8 codes of shape (N * positions, channels)."""
    return _codes(grad).movedim(1, -1).reshape(-1, grad.shape[1])


def _real(integers: Tensor, *operands: Tensor) -> Tensor:
    """Convert integers to FP32: all NaN if an operand had a non-finite value, which integers cannot represent."""
    result = integers.float()
    for operand in operands:
        result += operand.sum() * 0
    return result


def _inner(x: Tensor, spans: tuple[slice, ...]) -> Tensor:
    """Slice the last dimensions of a tensor, one slice for each."""
    index: tuple[slice | EllipsisType, ...] = (..., *spans)
    return x[index]


@dataclass(frozen=True)
class IntegerLinear(LinearProduct):
    """:class:`LinearProduct` of codes that fit in int8 (given in any dtype), accumulated in int32.

    Example:
        >>> IntegerLinear()(torch.full((2, 3), 7.0), torch.full((4, 3), 7.0))[0, 0]
        tensor(147.)
    """

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the output without bias, FP32."""
        flat = _codes(x).reshape(-1, x.shape[-1])
        return _real(integer_matmul(flat, _codes(weight).t()), x, weight).view(*x.shape[:-1], weight.shape[0])

    def input_gradient(self, grad: Tensor, weight: Tensor, x_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the input, shape ``x_shape``, FP32."""
        flat = _codes(grad).reshape(-1, grad.shape[-1])
        return _real(integer_matmul(flat, _codes(weight)), grad, weight).view(x_shape)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the weight, FP32."""
        flat = _codes(grad).reshape(-1, grad.shape[-1])
        return _real(integer_matmul(flat.t(), _codes(x).reshape(-1, x.shape[-1])), grad, x)


@dataclass(frozen=True, eq=False)
class IntegerConvolution(ConvolutionProduct):
    """:class:`ConvolutionProduct` (groups=1, not transposed) of codes that fit in int8, by unfold and int8 GEMM.

    Example:
        >>> product = IntegerConvolution((1, 1), (1, 1), (1, 1))
        >>> product(torch.full((1, 2, 4, 4), 7.0), torch.full((3, 2, 3, 3), -7.0))[0, 0, 1, 1]
        tensor(-882.)
    """

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the output without bias, FP32."""
        columns, output_size = self._unfold(_codes(x), weight.shape[2:])
        flat = integer_matmul(columns, _codes(weight).flatten(1).t())
        return _real(flat, x, weight).view(x.shape[0], *output_size, weight.shape[0]).movedim(-1, 1).contiguous()

    def input_gradient(self, grad: Tensor, weight: Tensor, x_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the input, shape ``x_shape``, FP32."""
        columns = integer_matmul(_rows(grad), _codes(weight).flatten(1))
        folded = self._fold(columns, x_shape, weight.shape[2:], grad.shape[2:])
        return _real(folded, grad, weight)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the weight, shape ``weight_shape``, FP32."""
        windows, _ = self._unfold(_codes(x), weight_shape[2:])
        return _real(integer_matmul(_rows(grad).t(), windows), grad, x).view(weight_shape)

    def _windows(self, padded: Tensor, kernel: Sequence[int], output_size: Sequence[int]) -> list[Tensor]:
        """Return one strided view of the padded tensor for each position in the kernel."""
        views = []
        for position in itertools.product(*map(range, kernel)):
            spans = zip(position, self.dilation, output_size, self.stride, strict=True)
            inner = tuple(slice(p * d, p * d + (n - 1) * s + 1, s) for p, d, n, s in spans)
            views.append(_inner(padded, inner))
        return views

    def _unfold(self, x: Tensor, kernel: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return the windows of (N, channels, ...) as (N * positions, channels * kernel), and the output size."""
        padded = F.pad(x, [p for pad in reversed(self.padding) for p in (pad, pad)])
        output_size = [
            (length - d * (k - 1) - 1) // s + 1
            for length, d, k, s in zip(padded.shape[2:], self.dilation, kernel, self.stride, strict=True)
        ]
        windows = torch.stack(self._windows(padded, kernel, output_size), dim=2)
        return windows.flatten(3).permute(0, 3, 1, 2).flatten(2).flatten(0, 1), output_size

    def _fold(
        self, columns: Tensor, x_shape: Sequence[int], kernel: Sequence[int], output_size: Sequence[int]
    ) -> Tensor:
        """Add (N * positions, channels * kernel) columns to their windows in (N, channels, ...)."""
        batch, channels = x_shape[:2]
        sizes = [length + 2 * pad for length, pad in zip(x_shape[2:], self.padding, strict=True)]
        padded = columns.new_zeros(batch, channels, *sizes)
        parts = columns.view(batch, *output_size, channels, math.prod(kernel)).movedim(-2, 1)
        for view, part in zip(self._windows(padded, kernel, output_size), parts.unbind(-1), strict=True):
            view += part
        return _inner(padded, tuple(slice(p, p + n) for p, n in zip(self.padding, x_shape[2:], strict=True)))


# A tuple for isinstance: PyTorch 2.6 does not trace isinstance with a union of types.
INTEGER_PRODUCTS = (IntegerLinear, IntegerConvolution)
