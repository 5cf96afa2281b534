"""What quantization costs and what it loses."""

from lightning_quant.metrics.bops import (
    LayerShape,
    ModelBops,
    attention_bops,
    convolution_bops,
    fully_connected_bops,
    measure_shapes,
    model_bops,
)

__all__ = [
    "LayerShape",
    "ModelBops",
    "attention_bops",
    "convolution_bops",
    "fully_connected_bops",
    "measure_shapes",
    "model_bops",
]
