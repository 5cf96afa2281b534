"""Range estimators, and the scale and zero point of a range."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.grid import Grid, decode, encode, symmetric_grid, unsigned_grid
from lightning_quant.functional.groups import affine_parameters


def rows(x: Tensor, axis: int | None) -> Tensor:
    """Reshape ``x`` to (channels, values): one row for the whole tensor, or one for each index of ``axis``."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _squeeze(low: Tensor, high: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return (low[0], high[0]) if axis is None else (low, high)


def min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute the smallest and largest value: 0-dim, or one for each index of ``axis``.

    Example:
        >>> [float(v) for v in min_max(torch.tensor([-1.0, 0.0, 3.0]))]
        [-1.0, 3.0]
    """
    low, high = rows(x, axis).aminmax(dim=1)
    return _squeeze(low, high, axis)


def percentile(x: Tensor, keep: float, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute the range that holds the middle ``keep`` percent of the values, by nearest rank.

    Args:
        x: Tensor of any shape.
        keep: Percentage in (0, 100]. 100 is the same as :func:`min_max`.
        axis: Axis with one range for each index, or None for a single range.

    Raises:
        ConfigurationError: ``keep`` is outside (0, 100].

    Example:
        >>> [float(v) for v in percentile(torch.arange(101.0), 90.0)]
        [5.0, 95.0]
    """
    if not 0 < keep <= 100:
        raise ConfigurationError(f"keep={keep}: expected a percentage in (0, 100], for example 99.9.")
    flat = rows(x, axis)
    cut = int((1 - keep / 100) / 2 * flat.shape[1])
    low = flat.kthvalue(cut + 1, dim=1).values
    return _squeeze(low, flat.kthvalue(flat.shape[1] - cut, dim=1).values, axis)


def scale_and_zero_point(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None, Grid]:
    """Compute the step size, zero point (None if symmetric) and grid that cover [low, high] and represent 0 exactly.

    A range of width 0 gets the smallest normal number as its step size, so that dividing by it is safe.

    Example:
        >>> scale, zero_point, grid = scale_and_zero_point(torch.tensor(-1.0), torch.tensor(2.0), 2, False)
        >>> float(scale), float(zero_point), grid
        (1.0, 1.0, Grid(low=0, high=3))
    """
    tiny = torch.finfo(low.dtype).tiny
    if symmetric:
        grid = symmetric_grid(bits)
        return (torch.maximum(-low, high) / grid.high).clamp_min(tiny), None, grid
    scale, zero_point = affine_parameters(low.clamp_max(0), high.clamp_min(0), bits, True, smallest_scale=tiny)
    return scale, zero_point, unsigned_grid(bits)


def mse_search(
    x: Tensor, bits: int, symmetric: bool, axis: int | None = None, candidates: int = 80
) -> tuple[Tensor, Tensor]:
    """Search the range with the smallest mean squared quantization error among shrunken min-max ranges.

    Args:
        x: Tensor of any shape.
        bits: Bit-width for which to search the range.
        symmetric: Whether the grid is symmetric, without a zero point.
        axis: Axis with one range for each index, or None for a single range.
        candidates: Number of ranges to try, in equal steps from min-max down to 1/candidates of it.

    Example:
        >>> x = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([10.0])])
        >>> bool(mse_search(x, 4, True)[1] < 10)
        True
    """
    flat = rows(x, axis)
    best_low, best_high = low, high = flat.aminmax(dim=1)
    best = torch.full_like(low, float("inf"))
    for ratio in torch.linspace(1, 1 / candidates, candidates).tolist():
        scale, zero_point, grid = scale_and_zero_point(low * ratio, high * ratio, bits, symmetric)
        scale, zero_point = scale[:, None], None if zero_point is None else zero_point[:, None]
        quantized = decode(encode(flat, scale, grid, zero_point), scale, zero_point)
        error = (quantized - flat).square().mean(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * ratio, best_low)
        best_high = torch.where(better, high * ratio, best_high)
    return _squeeze(best_low, best_high, axis)
