"""What quantization costs and what it loses."""

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
from lightning_quant.metrics.trajectory import accumulated_error, single_step_error

__all__ = [
    "GenerationMetrics",
    "LayerShape",
    "ModelBops",
    "UnavailableError",
    "accumulated_error",
    "attention_bops",
    "convolution_bops",
    "fully_connected_bops",
    "measure_shapes",
    "model_bops",
    "single_step_error",
]
