"""Instance-aware group quantization: channels or rows share a few quantizers and are assigned anew for each image.

Source: Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024 (arXiv 2404.00928).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.functional.grid import decode, encode, unsigned_grid

# A smaller range is a single point, and its step size would be noise.
SMALLEST_SCALE = 1e-8


def channel_ranges(x: Tensor) -> Tensor:
    """Compute the smallest and largest value of each channel of each image.

    Args:
        x: Tensor of shape (images, tokens, channels).

    Returns:
        Tensor of shape (images, channels, 2).

    Example:
        >>> channel_ranges(torch.tensor([[[1.0, 5.0], [2.0, -5.0]]])).tolist()
        [[[1.0, 2.0], [-5.0, 5.0]]]
    """
    return torch.stack([x.amin(dim=-2), x.amax(dim=-2)], dim=-1)


def row_maxima(attention: Tensor) -> Tensor:
    """Compute the largest probability of each row of a softmax: (..., rows, keys) to (..., rows, 1)."""
    return attention.amax(dim=-1, keepdim=True)


def assign(points: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the nearest center of each point, the first one on a tie.

    Args:
        points: Tensor of shape (..., dimensions).
        centres: Tensor of shape (groups, dimensions).

    Returns:
        Indices, int64, shape (...,): argmin over j of ``sum((point - centre_j)^2)``.

    Example:
        >>> assign(torch.tensor([[0.0, 1.0], [-4.0, 5.0]]), torch.tensor([[0.0, 2.0], [-5.0, 5.0]])).tolist()
        [0, 1]
    """
    distance = torch.zeros(*points.shape[:-1], len(centres), dtype=points.dtype, device=points.device)
    for dimension in range(points.shape[-1]):
        distance += (points[..., dimension, None] - centres[:, dimension]).square_()
    return distance.argmin(dim=-1)


def channel_groups(x: Tensor, centres: Tensor) -> Tensor:
    """Assign each channel of each image to the group whose center is nearest to the channel's (min, max).

    Args:
        x: Tensor of shape (images, tokens, channels).
        centres: Lower and upper bound of each group, shape (groups, 2).

    Returns:
        Group indices, int64, shape (images, 1, channels), which broadcasts to ``x``.

    Example:
        >>> centres = torch.tensor([[0.0, 3.0], [-10.0, 20.0]])
        >>> channel_groups(torch.tensor([[[0.0, -10.0], [1.1, 20.0]]]), centres).tolist()
        [[[0, 1]]]
    """
    return assign(channel_ranges(x).to(centres.dtype), centres).unsqueeze(-2)


def row_groups(attention: Tensor, centres: Tensor) -> Tensor:
    """Assign each row of a softmax to the group whose center is nearest to the row's maximum.

    Args:
        attention: Tensor of shape (..., rows, keys).
        centres: Tensor of shape (groups,).

    Returns:
        Group indices, int64, shape (..., rows, 1), which broadcasts to ``attention``.

    Example:
        >>> row_groups(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0.6, 0.9])).tolist()
        [[1], [0]]
    """
    return assign(row_maxima(attention).to(centres.dtype), centres[:, None]).unsqueeze(-1)


def affine_parameters(
    low: Tensor, high: Tensor, bits: int, clip_zero_point: bool = False, *, smallest_scale: float = SMALLEST_SCALE
) -> tuple[Tensor, Tensor]:
    """Compute step size and zero point of codes 0 .. 2^b-1 on [l, u]: ``s = (u-l)/(2^b-1)``, ``z = round(-l/s)``.

    The range need not contain 0: the zero point of a range of one sign lies outside the codes. See
    :func:`~lightning_quant.functional.scale_and_zero_point` for ranges that are extended to 0.

    Args:
        low: Lower bounds, any shape.
        high: Upper bounds, same shape.
        bits: Bit-width, 2 to 16.
        clip_zero_point: Whether to clip z to the codes, as the paper writes it. This moves a range of one sign to 0.
        smallest_scale: Lower bound of the step size.

    Example:
        >>> affine_parameters(torch.tensor(2.0), torch.tensor(5.0), 2)
        (tensor(1.), tensor(-2.))
    """
    top = unsigned_grid(bits).high
    scale = ((high - low) / top).clamp_min(smallest_scale)
    zero_point = (-low / scale).round()
    return scale, zero_point.clamp(0, top) if clip_zero_point else zero_point


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Quantize ``x`` to codes 0 .. 2^b-1 and back, in the dtype of ``x``. Scale and zero point broadcast to ``x``.

    Without the straight-through gradient of :func:`~lightning_quant.functional.fake_quantize`.

    Example:
        >>> quantize_affine(torch.tensor([1.9, 4.4, 9.0]), torch.tensor(1.0), torch.tensor(-2.0), 2).tolist()
        [2.0, 4.0, 5.0]
    """
    codes = encode(x, scale, unsigned_grid(bits), zero_point)
    return decode(codes, scale, zero_point).to(x.dtype)


def quantize_channels(x: Tensor, centres: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize each channel of each image with the quantizer of the group whose center is nearest to its range.

    Args:
        x: Tensor of shape (images, tokens, channels).
        centres: Lower and upper bound of each group, shape (groups, 2).
        scale: Step size of each group, shape (groups,).
        zero_point: Zero point of each group, shape (groups,).
        bits: Bit-width, 2 to 16.

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
    """Quantize each row of a softmax with the quantizer [0, u] of the group whose center is nearest to its maximum.

    Args:
        attention: Non-negative tensor of shape (..., rows, keys).
        centres: Maximum that each group stands for, shape (groups,).
        scale: Step size of each group, shape (groups,).
        bits: Bit-width, 2 to 16.

    Example:
        >>> attention = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
        >>> quantize_rows(attention, torch.tensor([0.6, 0.9]), torch.tensor([0.2, 0.3]), 2)
        tensor([[0.9000, 0.0000],
                [0.4000, 0.6000]])
    """
    return quantize_affine(attention, scale[row_groups(attention, centres)], None, bits)
