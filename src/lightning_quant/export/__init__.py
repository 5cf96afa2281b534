"""Quantized modules on disk, and back."""

from lightning_quant.export.checkpoint import load_from_checkpoint
from lightning_quant.gradient.structure import rebuild

__all__ = ["load_from_checkpoint", "rebuild"]
