"""Affine grid: the only place where values are divided by a scale and rounded to integer codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.blocks import BLOCK, blocks, is_dense

MIN_BITS, MAX_BITS, FLOAT_BITS = 2, 16, 32
_NEXT_TO_ONE = torch.finfo(torch.float32).eps
_NEXT_TO_ZERO = torch.finfo(torch.float32).tiny


class Grid(NamedTuple):
    """Smallest and largest integer code of a quantizer.

    Example:
        >>> symmetric_grid(4), unsigned_grid(4)
        (Grid(low=-7, high=7), Grid(low=0, high=15))
    """

    low: int
    high: int


def check_bits(bits: int, name: str = "bits", *, allow_float: bool = False) -> int:
    """Return ``bits`` if it is in 2..16, or 32 (float) if ``allow_float`` is set.

    Raises:
        ConfigurationError: Any other value.
    """
    value: object = bits
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and (MIN_BITS <= bits <= MAX_BITS or (allow_float and bits == FLOAT_BITS)):
        return bits
    choice = f"a whole number from {MIN_BITS} to {MAX_BITS}"
    choice += f", or {FLOAT_BITS} to leave the tensor in float" if allow_float else ""
    raise ConfigurationError(f"{name}={bits!r}: expected {choice}, for example {name}=4.")


def symmetric_grid(bits: int) -> Grid:
    """Return the grid of codes -(2^(b-1)-1) .. 2^(b-1)-1, which contains 0 and is symmetric under sign."""
    high = 2 ** (check_bits(bits) - 1) - 1
    return Grid(-high, high)


def unsigned_grid(bits: int) -> Grid:
    """Return the grid of codes 0 .. 2^b-1, for non-negative tensors and for asymmetric ranges with a zero point."""
    return Grid(0, 2 ** check_bits(bits) - 1)


def encode(
    x: Tensor,
    scale: Tensor,
    grid: Grid,
    zero_point: Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute integer codes ``clamp(round(x / scale + noise) + zero_point, low, high)``, stored as floating point.

    Mid-points round to the even code; uniform ``noise`` in (-1/2, 1/2) makes the rounding stochastic and unbiased.
    Codes are computed in FP32 for any dtype of ``x`` (in FP64 for FP64), since BF16 changes one code in twenty. NaN
    stays NaN. This function is not differentiable: see :func:`fake_quantize`.

    Args:
        x: Tensor of any shape.
        scale: Step size, positive, broadcastable to ``x``.
        grid: Smallest and largest code.
        zero_point: Code of the real number 0, same shape as ``scale``. Default: 0.
        noise: Noise in units of the step size, broadcastable to ``x``.
        out: Output tensor with the shape and strides of ``x``. May be ``noise`` itself.

    Example:
        >>> encode(torch.tensor([-2.0, 0.25, 0.5, 1.5, 9.0]), torch.tensor(1.0), Grid(0, 7)).tolist()
        [0.0, 0.0, 0.0, 2.0, 7.0]
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        if scale.dim() or x.numel() <= BLOCK or (noise is not None and noise.stride() != x.stride()) or not is_dense(x):
            return _encode(x.to(dtype), scale, grid, zero_point, noise, out)
        codes = torch.empty_like(x, dtype=dtype) if out is None else out
        for values, block, *rest in blocks(x, codes, *([] if noise is None else [noise])):
            _encode(values.to(dtype), scale, grid, zero_point, rest[0] if rest else None, block)
        return codes


def _encode(
    x: Tensor, scale: Tensor, grid: Grid, zero_point: Tensor | None, noise: Tensor | None, out: Tensor | None
) -> Tensor:
    codes = torch.div(x, scale, out=out) if noise is None else torch.addcdiv(noise, x, scale, out=out)
    return round_to_grid(codes, grid, zero_point)


def round_to_grid(positions: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Round positions ``x / scale`` to codes in place: the second half of :func:`encode`."""
    positions.round_()
    if zero_point is not None:
        positions.add_(zero_point)
    return positions.clamp_(grid.low, grid.high)


def clamp_bounds(grid: Grid) -> tuple[float, float]:
    """Return the FP32 numbers next to the grid: the open interval of positions that the clamp does not move."""
    low = -_NEXT_TO_ZERO if grid.low == 0 else grid.low * (1 + _NEXT_TO_ONE)
    return low, grid.high * (1 + _NEXT_TO_ONE)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Compute the real values ``(codes - zero_point) * scale`` of codes of any dtype, in the dtype of ``scale``.

    Example:
        >>> decode(torch.tensor([0, 3], dtype=torch.int8), torch.tensor(0.5)).tolist()
        [0.0, 1.5]
    """
    values = codes.to(scale.dtype)
    return (values if zero_point is None else values - zero_point) * scale


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        ctx.grid, ctx.shifts = grid, zero_point is not None  # type: ignore[attr-defined]
        output = decode(encode(x, scale, grid, zero_point), scale, zero_point).to(x.dtype)
        # The product that follows saves the output anyway. In half precision its rounding would enter the gradient.
        learned = ctx.needs_input_grad[1] and output.dtype == scale.dtype  # type: ignore[attr-defined]
        ctx.save_for_backward(x, scale, *(t for t in (zero_point, output if learned else None) if t is not None))
        return output

    @staticmethod
    def backward(  # type: ignore[no-untyped-def]
        ctx, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, scale, *rest = ctx.saved_tensors
        zero_point = rest[0] if ctx.shifts else None
        passed = grad * is_inside(x, scale, ctx.grid, zero_point)
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            exact = x.dtype == scale.dtype
            output = rest[-1] if exact else decode(encode(x, scale, ctx.grid, zero_point), scale, zero_point)
            # grad * ((code - zero) - x / scale), the second term inside the clamp only, from tensors that are at hand.
            grad_scale = (_dots(grad, output, scale) - _dots(passed, x, scale)) / scale
        if ctx.needs_input_grad[2]:
            grad_zero = -scale * (grad - passed).to(scale.dtype).sum_to_size(scale.shape)
        return passed, grad_scale, grad_zero, None


def _dots(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum ``a * b`` to the shape of ``like``; without storing the product where that is a single sum."""
    if like.numel() == 1 and a.dtype == b.dtype == like.dtype:
        return torch.dot(a.flatten(), b.flatten()).view_as(like)
    return (a.to(like.dtype) * b).sum_to_size(like.shape)


def _wide(x: Tensor) -> Tensor:
    """Convert to the dtype in which codes are computed; with a 0-dim scale BF16 would stay BF16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_inside(x: Tensor, scale: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Return the boolean mask of the values that the clamp does not move: ``low <= x / scale + zero_point <= high``."""
    position = _wide(x) / scale if zero_point is None else _wide(x) / scale + zero_point
    return (position >= grid.low) & (position <= grid.high)


def fake_quantize(x: Tensor, scale: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Quantize and dequantize ``x``, in the dtype of ``x``. Differentiable in all tensors.

    The gradient of ``x`` is straight-through for the rounding and 0 where the clamp acts. The gradient of the scale is
    ``sum(grad * (code - x / scale))``, with the second term inside the clamp only (LSQ, arXiv 1902.08153). The gradient
    of the zero point is ``-scale * sum(grad)`` over the clamped values (LSQ+, arXiv 2004.09576).

    Args:
        x: Tensor of any shape.
        scale: Step size, positive, broadcastable to ``x`` (see :func:`per_channel`).
        grid: Smallest and largest code.
        zero_point: Code of the real number 0, an integer, same shape as ``scale``.

    Example:
        >>> fake_quantize(torch.tensor([0.2, 0.9, 5.0]), torch.tensor(0.5), symmetric_grid(3)).tolist()
        [0.0, 1.0, 1.5]
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, grid)
    return result


def per_channel(parameter: Tensor, axis: int, ndim: int) -> Tensor:
    """View a (channels,) tensor so that it broadcasts along ``axis`` of a tensor of ``ndim`` dimensions.

    Example:
        >>> per_channel(torch.ones(5), 0, 4).shape
        torch.Size([5, 1, 1, 1])
    """
    return parameter.reshape([-1 if dim == axis % ndim else 1 for dim in range(ndim)])


def exact_in(dtype: torch.dtype, grid: Grid) -> bool:
    """Return whether ``dtype`` represents every code of the grid exactly (BF16 holds integers up to 256).

    Example:
        >>> exact_in(torch.bfloat16, unsigned_grid(8)), exact_in(torch.bfloat16, unsigned_grid(9))
        (True, False)
    """
    return max(-grid.low, grid.high) <= 2 / torch.finfo(dtype).eps
