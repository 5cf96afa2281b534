"""Quantized layers, choosing layers, swapping them in and back."""

from lightning_quant.nn.layers import QuantizedLayer, register, restore, swap
from lightning_quant.nn.product import quantized_product
from lightning_quant.nn.selection import Bits, Plan, plan_layers
from lightning_quant.nn.strip import strip

__all__ = [
    "Bits",
    "Plan",
    "QuantizedLayer",
    "plan_layers",
    "quantized_product",
    "register",
    "restore",
    "strip",
    "swap",
]
