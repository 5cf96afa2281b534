"""Quantized modules on disk, and back."""

from lightning_quant.export.artifact import load_quantized, save_quantized
from lightning_quant.export.callback import SaveQuantized
from lightning_quant.export.checkpoint import load_from_checkpoint

__all__ = ["SaveQuantized", "load_from_checkpoint", "load_quantized", "save_quantized"]
