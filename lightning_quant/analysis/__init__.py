"""Measured cost of each layer of a quantized network, with causes."""

from lightning_quant.analysis.causes import Cause, find_causes
from lightning_quant.analysis.layers import LayerAnalysis
from lightning_quant.analysis.network import Analysis, analyze_network, trained_quantized
from lightning_quant.analysis.recording import Recorder, quantized_root

__all__ = [
    "Analysis",
    "Cause",
    "LayerAnalysis",
    "Recorder",
    "analyze_network",
    "find_causes",
    "quantized_root",
    "trained_quantized",
]
