"""Compressed activations for the backward pass: code, rounding residual and clip mask in one byte.

The gradient of a learned range needs more than the code: it needs ``code - x / scale`` for each value inside the
clamp. A 4-bit code leaves half a byte, which stores that residual in 16 levels, accurate to 1/32 of a step. It encodes
the mask too: a position beyond the highest or lowest code was clipped. Codes of 5 to 8 bits take two bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.functional.blocks import blocks, dense, like
from lightning_quant.functional.grid import Grid


def container(grid: Grid) -> tuple[torch.dtype, int] | None:
    """Return the dtype that holds a code with its residual, and the number of residual levels; None above 8 bits.

    Example:
        >>> container(Grid(0, 15)), container(Grid(-127, 127)), container(Grid(0, 1023))
        ((torch.uint8, 16), (torch.int16, 128), None)
    """
    match grid.high - grid.low:
        case width if width < 16:
            return torch.uint8, 16
        case width if width < 256:
            return torch.int16, 128
        case _:
            return None


def pack(x: Tensor, codes: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Pack ``x`` and its codes from ``encode``: one byte per value up to 4 bits, two up to 8.

    Args:
        x: Tensor of any shape.
        codes: Codes of ``x``, same shape.
        scale: Step size, 0-dim.
        grid: Smallest and largest code, at most 8 bits.

    Example:
        >>> from lightning_quant.functional.grid import encode
        >>> grid, scale, x = Grid(-7, 7), torch.tensor(0.1), torch.tensor([-9.0, 0.0, 0.24])
        >>> packed = pack(x, encode(x, scale, grid), scale, grid)
        >>> packed.dtype, [round(position, 1) for position in unpack(packed, grid).tolist()]
        (torch.uint8, [-7.5, 0.0, 2.4])
    """
    dtype, levels = _container(grid)
    x = dense(x)
    packed = torch.empty_like(x, dtype=dtype)
    for v, c, p in blocks(x, like(codes, x), packed):
        # Relative to the code, the residual of a mid-point keeps the side to which encode rounded it.
        residual = torch.div(v.float(), scale).sub_(c).clamp_(0.5 / levels - 0.5, 0.5 - 0.5 / levels)
        # Slightly less, so that the highest code itself falls into the level below it, which is inside the grid.
        p.copy_(residual.add_(c).mul_(levels * (1 - 2.0**-20)).add_(levels * (0.5 - grid.low)))
    return packed


def unpack(packed: Tensor, grid: Grid) -> Tensor:
    """Return the positions ``x / scale``, FP32, to half a residual level. Those beyond the grid were clipped."""
    _, levels = _container(grid)
    return packed.float().add_(0.5 - levels * (0.5 - grid.low)).div_(levels)


def codes_of(packed: Tensor, grid: Grid) -> Tensor:
    """Return the packed codes, FP32."""
    _, levels = _container(grid)
    return (packed >> (levels.bit_length() - 1)).float().add_(grid.low)


def _container(grid: Grid) -> tuple[torch.dtype, int]:
    layout = container(grid)
    if layout is None:
        raise ValueError(f"{grid}: codes of more than 8 bits cannot be packed, since that saves no memory.")
    return layout
