"""Quantizers as modules: the functions of ``functional`` together with their state."""

from lightning_quant.quantizers.base import Quantizer
from lightning_quant.quantizers.fixed import FixedQuantizer
from lightning_quant.quantizers.learned import LearnedQuantizer
from lightning_quant.quantizers.rounded import RoundedQuantizer
from lightning_quant.quantizers.timestep import TimestepQuantizer

__all__ = ["FixedQuantizer", "LearnedQuantizer", "Quantizer", "RoundedQuantizer", "TimestepQuantizer"]
