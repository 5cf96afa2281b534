"""The affine grid: the one place where values are divided by a scale and rounded to integer codes."""

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
    """Smallest and largest integer code.

    Example:
        >>> symmetric_grid(4), unsigned_grid(4)
        (Grid(low=-7, high=7), Grid(low=0, high=15))
    """

    low: int
    high: int


def check_bits(bits: int, name: str = "bits", *, allow_float: bool = False) -> int:
    """Return ``bits`` if it is in 2..16, or 32 ("leave it in float") where ``allow_float`` is set.

    Raises:
        ConfigurationError: otherwise.
    """
    value: object = bits
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and (MIN_BITS <= bits <= MAX_BITS or (allow_float and bits == FLOAT_BITS)):
        return bits
    choice = f"a whole number from {MIN_BITS} to {MAX_BITS}"
    choice += f", or {FLOAT_BITS} to leave the tensor in float" if allow_float else ""
    raise ConfigurationError(f"{name}={bits!r}: expected {choice}, for example {name}=4.")


def symmetric_grid(bits: int) -> Grid:
    """Codes -(2^(b-1)-1) .. 2^(b-1)-1: zero is a code and the grid has no sign preference."""
    high = 2 ** (check_bits(bits) - 1) - 1
    return Grid(-high, high)


def unsigned_grid(bits: int) -> Grid:
    """Codes 0 .. 2^b-1, for one-signed tensors and for asymmetric ranges with a zero point."""
    return Grid(0, 2 ** check_bits(bits) - 1)


def encode(
    x: Tensor,
    scale: Tensor,
    grid: Grid,
    zero_point: Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Integer codes ``clamp(round(x / scale + noise) + zero_point, low, high)``, kept in floating point.

    Rounding is half to even; ``noise`` uniform in (-1/2, 1/2) makes it stochastic and unbiased. Codes are
    computed in FP32 whatever the dtype of ``x`` (FP64 for FP64), since BF16 moves one code in twenty.
    NaN stays NaN. Not differentiable: see :func:`fake_quantize`.

    Args:
        x: any shape.
        scale: step size, broadcastable to ``x``, positive.
        grid: smallest and largest code.
        zero_point: code of the real number 0, of the shape of ``scale``; 0 where left out.
        noise: broadcastable to ``x``, in units of the step.
        out: where to write, of the shape and strides of ``x``; may be ``noise`` itself.

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
    """Codes of positions ``x / scale``, in place: the second half of :func:`encode`."""
    positions.round_()
    if zero_point is not None:
        positions.add_(zero_point)
    return positions.clamp_(grid.low, grid.high)


def clamp_bounds(grid: Grid) -> tuple[float, float]:
    """The next FP32 numbers beyond the grid: the open interval of positions that no clamp moves."""
    low = -_NEXT_TO_ZERO if grid.low == 0 else grid.low * (1 + _NEXT_TO_ONE)
    return low, grid.high * (1 + _NEXT_TO_ONE)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Real values ``(codes - zero_point) * scale`` of integer codes of any dtype, in the dtype of ``scale``.

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
        # The product that follows keeps the output anyway; in half precision its rounding would be in the gradient.
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
            # grad ((code - zero) - x / scale inside the clamp): of values that are there.
            grad_scale = (_dots(grad, output, scale) - _dots(passed, x, scale)) / scale
        if ctx.needs_input_grad[2]:
            grad_zero = -scale * (grad - passed).to(scale.dtype).sum_to_size(scale.shape)
        return passed, grad_scale, grad_zero, None


def _dots(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sums of ``a * b`` over what ``like`` broadcasts to, without the product where that is all of it."""
    if like.numel() == 1 and a.dtype == b.dtype == like.dtype:
        return torch.dot(a.flatten(), b.flatten()).view_as(like)
    return (a.to(like.dtype) * b).sum_to_size(like.shape)


def _wide(x: Tensor) -> Tensor:
    """In the dtype that codes are computed in: beside a 0-dim scale BF16 would stay BF16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_inside(x: Tensor, scale: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Boolean mask of the values that no clamp moves: ``low <= x / scale + zero_point <= high``."""
    position = _wide(x) / scale if zero_point is None else _wide(x) / scale + zero_point
    return (position >= grid.low) & (position <= grid.high)


def fake_quantize(x: Tensor, scale: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Values of ``x`` moved to the grid, in the dtype of ``x``; differentiable in all tensors.

    Straight-through for the rounding, zero gradient where the clamp acts; the gradient of the scale is
    ``sum(grad * (code - x / scale))``, with the second term only inside the clamp (LSQ, arXiv 1902.08153), that of the
    zero point ``-scale * sum(grad)`` over what the clamp moves (LSQ+, arXiv 2004.09576).

    Args:
        x: any shape.
        scale: positive, broadcastable to ``x`` (see :func:`per_channel`).
        grid: smallest and largest code.
        zero_point: integral, of the shape of ``scale``.

    Example:
        >>> fake_quantize(torch.tensor([0.2, 0.9, 5.0]), torch.tensor(0.5), symmetric_grid(3)).tolist()
        [0.0, 1.0, 1.5]
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, grid)
    return result


def per_channel(parameter: Tensor, axis: int, ndim: int) -> Tensor:
    """View of a (channels,) tensor that broadcasts along ``axis`` of a tensor of ``ndim`` dimensions.

    Example:
        >>> per_channel(torch.ones(5), 0, 4).shape
        torch.Size([5, 1, 1, 1])
    """
    return parameter.reshape([-1 if dim == axis % ndim else 1 for dim in range(ndim)])


def split_groups(x: Tensor, group_size: int) -> Tensor:
    """View of (..., channels) as (..., channels / group_size, group_size), one scale to a group.

    Raises:
        ConfigurationError: where the last dimension is not a multiple of ``group_size``.

    Example:
        >>> split_groups(torch.zeros(2, 12), 4).shape
        torch.Size([2, 3, 4])
    """
    channels = x.shape[-1]
    if group_size < 1 or channels % group_size:
        raise ConfigurationError(f"group_size={group_size}: expected a divisor of the {channels} channels.")
    return torch.unflatten(x, -1, (channels // group_size, group_size))


def exact_in(dtype: torch.dtype, grid: Grid) -> bool:
    """Whether every code of the grid is represented exactly in ``dtype`` (BF16 holds integers up to 256).

    Example:
        >>> exact_in(torch.bfloat16, unsigned_grid(8)), exact_in(torch.bfloat16, unsigned_grid(9))
        (True, False)
    """
    return max(-grid.low, grid.high) <= 2 / torch.finfo(dtype).eps
