"""What each scheme does with the input of a fully connected layer and with a softmax: IGQ, its baselines, its bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.functional.groups import SMALLEST_SCALE, affine_parameters
from lightning_quant.igq_vit.ranges import fit_channel_groups, fit_row_groups, layer_wise_range
from lightning_quant.igq_vit.settings import Settings
from lightning_quant.quantizers import FixedQuantizer, Quantizer
from lightning_quant.quantizers.dynamic import ChannelQuantizer, LogQuantizer, TokenQuantizer

PATCH_BITS = 8
# Per cent of the values left out at each end, to choose from by the least error.
ACTIVATION_TAILS = (0.1, 0.01, 0.001)
WEIGHT_TAILS = (0.0, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0)
# By the square, 6 bits clip the few large entries of Q and K by which rows attend: the cube halves the KL divergence of
# DINOv2-small at 6 bits and leaves that at 4 bits (benchmarks/igq_dinov2.py).
OPERAND_POWER = 3
# The key of a quantizer that has no groups.
UNGROUPED = 0
Candidates = dict[int, Quantizer]


def fixed(
    low: Tensor, high: Tensor, bits: int, axis: int | None = None, clip_zero_point: bool = False
) -> FixedQuantizer:
    """A quantizer of given bounds, 0-dim or one for each index of ``axis``; the zero point may be no code."""
    quantizer = FixedQuantizer(bits, symmetric=False, axis=axis).to(low.device)
    quantizer.scale, quantizer.zero_point = affine_parameters(low.float(), high.float(), bits, clip_zero_point)
    quantizer.ready = True
    return quantizer


def layer_wise(x: Tensor, bits: int, settings: Settings, images: int, power: int = 2) -> FixedQuantizer:
    """One quantizer for a whole tensor of so many images, of the least mean ``power`` of the errors."""
    tails = (0.0,) if settings.layer_range == "min_max" else ACTIVATION_TAILS
    return fixed(*layer_wise_range(x, bits, tails, images, power), bits, clip_zero_point=settings.literal_zero_point)


def fit_input(x: Tensor, weight: Tensor, settings: Settings, sizes: Sequence[int]) -> Candidates:
    """Quantizers of the input of a fully connected layer, by number of groups.

    Args:
        x: (images, tokens, channels), the calibration images of this rank.
        weight: (out, channels) of the layer.
        settings: scheme, bits, and how ranges are found.
        sizes: numbers of groups to fit.
    """
    bits = settings.activation_bits
    match settings.scheme:
        case "igq":
            importance = weight.detach().double().square().sum(dim=0)
            return dict(
                fit_channel_groups(
                    x, bits, sizes, settings.group_ranges, settings.literal_zero_point, importance=importance
                )
            )
        case "upper_bound":
            return {UNGROUPED: ChannelQuantizer(bits)}
        case "per_token":
            return {UNGROUPED: TokenQuantizer(bits)}
        case _:
            return {UNGROUPED: layer_wise(x, bits, settings, len(x))}


def fit_softmax(attention: Tensor, settings: Settings, sizes: Sequence[int], images: int) -> Candidates:
    """Quantizers of the softmax (images x windows, heads, rows, keys) of so many images, by number of groups."""
    bits = settings.activation_bits
    match settings.scheme:
        case "igq":
            return dict(fit_row_groups(attention, bits, sizes, settings.group_ranges, images))
        case "upper_bound" | "per_token":
            return {UNGROUPED: TokenQuantizer(bits, from_zero=True)}
        case "repq":
            _, high = layer_wise_range(attention, 16, (0.0,))
            quantizer = LogQuantizer(bits).to(attention.device)
            quantizer.scale = high.float().clamp_min(SMALLEST_SCALE)
            quantizer.ready = True
            return {UNGROUPED: quantizer}
        case _:
            tails = (0.0,) if settings.layer_range == "min_max" else ACTIVATION_TAILS
            _, high = layer_wise_range(attention, bits, tails, images)
            return {UNGROUPED: fixed(torch.zeros_like(high), high, bits)}
