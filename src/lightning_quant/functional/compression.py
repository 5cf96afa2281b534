"""Codes kept for the backward pass: integer code, rounding residual and clip mask in one byte.

The gradient of a learned range needs more than the code: ``code - x / scale`` for each value inside the
clamp. A 4-bit code leaves half a byte. There the residual is kept in 15 levels, and the sixteenth says that the
value was clipped. The residual is then known to 1/30 of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.functional.grid import Grid, is_inside


def container(grid: Grid) -> tuple[torch.dtype, int] | None:
    """Dtype that holds a code with its residual, and the residual's levels; None above 8 bits.

    >>> container(Grid(0, 15)), container(Grid(-127, 127)), container(Grid(0, 1023))
    ((torch.uint8, 15), (torch.int16, 127), None)
    """
    match grid.high - grid.low:
        case width if width < 16:
            return torch.uint8, 15
        case width if width < 256:
            return torch.int16, 127
        case _:
            return None


def pack(x: Tensor, codes: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """One byte a value up to 4 bits, two up to 8, of ``x`` and the codes that :func:`encode` gave for it.

    >>> from lightning_quant.functional.grid import encode
    >>> grid, scale, x = Grid(-7, 7), torch.tensor(0.1), torch.tensor([-9.0, 0.0, 0.24])
    >>> packed = pack(x, encode(x, scale, grid), scale, grid)
    >>> packed.dtype, [round(position, 1) for position in unpack(packed, grid).tolist()]
    (torch.uint8, [8.0, 0.0, 2.4])
    """
    dtype, levels = _container(grid)
    residual = (x.float() / scale).sub_(codes).add_(0.5).mul_(levels).floor_().clamp_(0, levels - 1)
    residual.masked_fill_(~is_inside(x, scale, grid), levels)
    return residual.add_(codes - grid.low, alpha=levels + 1).to(dtype)


def unpack(packed: Tensor, grid: Grid) -> Tensor:
    """Positions ``x / scale`` (FP32) to half a residual level, which round to the codes that were packed.

    Clipped values get a position beyond the grid, ``high + 1`` on either side: their code must not be taken from it
    (see :func:`codes_of`), and the gradient of the clamp there is 0.
    """
    _, levels = _container(grid)
    residual = packed & levels
    positions = residual.float().add_(0.5).div_(levels).add_(grid.low - 0.5)
    positions.add_(packed >> levels.bit_length())
    return positions.masked_fill_(residual == levels, grid.high + 1)


def codes_of(packed: Tensor, grid: Grid) -> Tensor:
    """The codes that were packed, FP32."""
    _, levels = _container(grid)
    return (packed >> levels.bit_length()).float().add_(grid.low)


def _container(grid: Grid) -> tuple[torch.dtype, int]:
    found = container(grid)
    if found is None:
        raise ValueError(f"{grid}: codes of more than 8 bits are no shorter than what they stand for.")
    return found
