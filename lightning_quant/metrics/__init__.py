"""Measures of the cost of quantization and of the quality that it loses."""

from lightning_quant.errors import UnavailableError
from lightning_quant.metrics.bops import (
    LayerShape,
    ModelBops,
    attention_bops,
    convolution_bops,
    fully_connected_bops,
    measure_shapes,
    model_bops,
)
from lightning_quant.metrics.generation import GenerationMetrics

__all__ = [
    "GenerationMetrics",
    "LayerShape",
    "ModelBops",
    "UnavailableError",
    "attention_bops",
    "convolution_bops",
    "fully_connected_bops",
    "measure_shapes",
    "model_bops",
]
