"""INT4 training: gradients quantized in the backward pass, so that the large ones keep a small error.

Source: Kim et al., "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients", ECCV 2024.
"""

from lightning_quant.gradient.callback import GradientQuantization
from lightning_quant.gradient.interval import (
    FixedInterval,
    IntervalStrategy,
    LargeGradientInterval,
    MinimumErrorInterval,
    MinMaxInterval,
)

__all__ = [
    "FixedInterval",
    "GradientQuantization",
    "IntervalStrategy",
    "LargeGradientInterval",
    "MinMaxInterval",
    "MinimumErrorInterval",
]
