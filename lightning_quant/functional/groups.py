"""Quantization by group: channels, or rows, that share one of a few quantizers, assigned anew for each image.

Source: Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024 (arXiv 2404.00928).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.functional.grid import decode, encode, unsigned_grid

# Below this a range is a point, and its step would be noise.
SMALLEST_SCALE = 1e-8


def channel_ranges(x: Tensor) -> Tensor:
    """Smallest and largest value of each channel of each image.

    Args:
        x: (images, tokens, channels).

    Returns:
        (images, channels, 2).

    Example:
        >>> channel_ranges(torch.tensor([[[1.0, 5.0], [2.0, -5.0]]])).tolist()
        [[[1.0, 2.0], [-5.0, 5.0]]]
    """
    return torch.stack([x.amin(dim=-2), x.amax(dim=-2)], dim=-1)


def row_maxima(attention: Tensor) -> Tensor:
    """Largest probability of each row of a softmax, (..., rows, keys) to (..., rows, 1)."""
    return attention.amax(dim=-1, keepdim=True)


def assign(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre of each point, the first of equally near ones.

    Args:
        points: (..., dimensions).
        centres: (groups, dimensions).

    Returns:
        int64 (...,): argmin over j of ``sum((point - centre_j)^2)``.

    Example:
        >>> assign(torch.tensor([[0.0, 1.0], [-4.0, 5.0]]), torch.tensor([[0.0, 2.0], [-5.0, 5.0]])).tolist()
        [0, 1]
    """
    distance = torch.zeros(*points.shape[:-1], len(centres), dtype=points.dtype, device=points.device)
    for dimension in range(points.shape[-1]):
        distance += (points[..., dimension, None] - centres[:, dimension]).square_()
    return distance.argmin(dim=-1)


def channel_groups(x: Tensor, centres: Tensor) -> Tensor:
    """Group of each channel of each image, whose (min, max) is nearest to its centre.

    Args:
        x: (images, tokens, channels).
        centres: (groups, 2), lower and upper bound.

    Returns:
        int64 (images, 1, channels), which broadcasts to ``x``.

    Example:
        >>> centres = torch.tensor([[0.0, 3.0], [-10.0, 20.0]])
        >>> channel_groups(torch.tensor([[[0.0, -10.0], [1.1, 20.0]]]), centres).tolist()
        [[[0, 1]]]
    """
    return assign(channel_ranges(x).to(centres.dtype), centres).unsqueeze(-2)


def row_groups(attention: Tensor, centres: Tensor) -> Tensor:
    """Group of each row of a softmax, whose maximum is nearest to its centre.

    Args:
        attention: (..., rows, keys).
        centres: (groups,).

    Returns:
        int64 (..., rows, 1), which broadcasts to ``attention``.

    Example:
        >>> row_groups(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0.6, 0.9])).tolist()
        [[1], [0]]
    """
    return assign(row_maxima(attention).to(centres.dtype), centres[:, None]).unsqueeze(-1)


def affine_parameters(low: Tensor, high: Tensor, bits: int, clip_zero_point: bool = False) -> tuple[Tensor, Tensor]:
    """Step size and zero point of the codes 0 .. 2^b-1 on [low, high]: ``s = (u-l)/(2^b-1)``, ``z = round(-l/s)``.

    Unlike :func:`scale_and_zero_point` the range need not hold 0: the zero point of a range of one sign lies
    outside the codes.

    Args:
        low: lower bounds, any shape.
        high: upper bounds, of the same shape.
        bits: 2..16.
        clip_zero_point: clip z to the codes, as the paper writes it: a range of one sign is then moved to 0.

    Example:
        >>> affine_parameters(torch.tensor(2.0), torch.tensor(5.0), 2)
        (tensor(1.), tensor(-2.))
    """
    top = unsigned_grid(bits).high
    scale = ((high - low) / top).clamp_min(SMALLEST_SCALE)
    zero_point = (-low / scale).round()
    return scale, zero_point.clamp(0, top) if clip_zero_point else zero_point


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Values of ``x`` on grids of codes 0 .. 2^b-1, in the dtype of ``x``; parameters broadcast to ``x``.

    Example:
        >>> quantize_affine(torch.tensor([1.9, 4.4, 9.0]), torch.tensor(1.0), torch.tensor(-2.0), 2).tolist()
        [2.0, 4.0, 5.0]
    """
    codes = encode(x, scale, unsigned_grid(bits), zero_point)
    return decode(codes, scale, zero_point).to(x.dtype)


def quantize_channels(x: Tensor, centres: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Each channel of each image with the quantizer of the group whose centre is nearest to its range.

    Args:
        x: (images, tokens, channels).
        centres: (groups, 2), lower and upper bound.
        scale: (groups,).
        zero_point: (groups,).
        bits: 2..16.

    Example:
        >>> x = torch.tensor([[[0.0, -10.0], [1.1, 20.0]]])
        >>> centres = torch.tensor([[0.0, 3.0], [-10.0, 20.0]])
        >>> scale, zero_point = affine_parameters(centres[:, 0], centres[:, 1], 2)
        >>> quantize_channels(x, centres, scale, zero_point, 2).tolist()
        [[[0.0, -10.0], [1.0, 20.0]]]
    """
    group = channel_groups(x, centres)
    return quantize_affine(x, scale[group], zero_point[group], bits)


def quantize_rows(attention: Tensor, centres: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Each row of a softmax with the quantizer [0, u] of the group whose centre is nearest to its maximum.

    Args:
        attention: (..., rows, keys), not negative.
        centres: (groups,).
        scale: (groups,).
        bits: 2..16.

    Example:
        >>> attention = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
        >>> quantize_rows(attention, torch.tensor([0.6, 0.9]), torch.tensor([0.2, 0.3]), 2)
        tensor([[0.9000, 0.0000],
                [0.4000, 0.6000]])
    """
    return quantize_affine(attention, scale[row_groups(attention, centres)], None, bits)
