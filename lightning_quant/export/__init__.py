"""Saving and loading of quantized modules and pipelines."""

from lightning_quant.export.artifact import load_quantized, save_quantized
from lightning_quant.export.callback import SaveQuantized
from lightning_quant.export.checkpoint import load_from_checkpoint
from lightning_quant.export.pipeline import load_quantized_pipeline, save_quantized_pipeline

__all__ = [
    "SaveQuantized",
    "load_from_checkpoint",
    "load_quantized",
    "load_quantized_pipeline",
    "save_quantized",
    "save_quantized_pipeline",
]
