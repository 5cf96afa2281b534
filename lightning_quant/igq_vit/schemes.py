"""Quantization schemes for inputs of fully connected layers and for softmax: IGQ, its baselines, its upper bound."""

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
# Percentages of the values left out at each end, of which the one with the smallest error is chosen.
ACTIVATION_TAILS = (0.1, 0.01, 0.001)
WEIGHT_TAILS = (0.0, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0)
# With the squared error, 6 bits clip the few large entries of Q and K that decide the attention. The cube halves the KL
# divergence of DINOv2-small at 6 bits and does not change it at 4 bits (benchmarks/igq_dinov2.py).
OPERAND_POWER = 3
# Key of a quantizer without groups.
UNGROUPED = 0
Candidates = dict[int, Quantizer]


def fixed(
    low: Tensor, high: Tensor, bits: int, axis: int | None = None, clip_zero_point: bool = False
) -> FixedQuantizer:
    """Create a quantizer with given bounds, 0-dim or one per index of ``axis``; the zero point need not be a code."""
    quantizer = FixedQuantizer(bits, symmetric=False, axis=axis).to(low.device)
    quantizer.scale, quantizer.zero_point = affine_parameters(low.float(), high.float(), bits, clip_zero_point)
    quantizer.ready = True
    return quantizer


def layer_wise(x: Tensor, bits: int, settings: Settings, images: int, power: int = 2) -> FixedQuantizer:
    """Fit one quantizer to a tensor of ``images`` images, by the smallest mean ``power`` of the absolute errors."""
    tails = (0.0,) if settings.layer_range == "min_max" else ACTIVATION_TAILS
    return fixed(*layer_wise_range(x, bits, tails, images, power), bits, clip_zero_point=settings.literal_zero_point)


def fit_input(x: Tensor, weight: Tensor, settings: Settings, sizes: Sequence[int]) -> Candidates:
    """Fit quantizers to the input of a fully connected layer.

    Args:
        x: Input (images, tokens, channels) for the calibration images of this rank.
        weight: Weight (out, channels) of the layer.
        settings: Settings of the calibration.
        sizes: Numbers of groups to fit.

    Returns:
        Quantizers, keyed by number of groups.
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
    """Fit quantizers, keyed by number of groups, to a softmax (images x windows, heads, rows, keys)."""
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
