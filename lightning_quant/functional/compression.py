"""Codes kept for the backward pass: integer code, rounding residual and clip mask in one byte.

The gradient of a learned range needs more than the code: ``code - x / scale`` for each value inside the
clamp. A 4-bit code leaves half a byte, which holds the residual in 16 levels, known to 1/32 of a step. It holds
the mask too: a position beyond the highest or the lowest code is one that was clipped. Codes of 5 to 8 bits take
two bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.functional.blocks import blocks, dense, like
from lightning_quant.functional.grid import Grid


def container(grid: Grid) -> tuple[torch.dtype, int] | None:
    """Dtype that holds a code with its residual, and the residual's levels; None above 8 bits.

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
    """One byte a value up to 4 bits, two up to 8, of ``x`` and the codes that ``encode`` gave for it.

    Args:
        x: any shape.
        codes: of the shape of ``x``.
        scale: step size, 0-dim.
        grid: smallest and largest code, of at most 8 bits.

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
        # Taken from the code, the residual of a mid-point has the side to which encode rounded it.
        residual = torch.div(v.float(), scale).sub_(c).clamp_(0.5 / levels - 0.5, 0.5 - 0.5 / levels)
        # A hair towards 0: the highest code itself belongs to the level below it, which is not beyond the grid.
        p.copy_(residual.add_(c).mul_(levels * (1 - 2.0**-20)).add_(levels * (0.5 - grid.low)))
    return packed


def unpack(packed: Tensor, grid: Grid) -> Tensor:
    """Positions ``x / scale`` (FP32) to half a residual level; those beyond the grid were clipped."""
    _, levels = _container(grid)
    return packed.float().add_(0.5 - levels * (0.5 - grid.low)).div_(levels)


def codes_of(packed: Tensor, grid: Grid) -> Tensor:
    """The codes that were packed, FP32."""
    _, levels = _container(grid)
    return (packed >> (levels.bit_length() - 1)).float().add_(grid.low)


def _container(grid: Grid) -> tuple[torch.dtype, int]:
    found = container(grid)
    if found is None:
        raise ValueError(f"{grid}: codes of more than 8 bits are no shorter than what they stand for.")
    return found
