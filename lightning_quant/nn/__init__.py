"""Quantized layers and attentions, the selection of layers, and swapping them in and out."""

from lightning_quant.nn.attention import (
    ATTENTIONS,
    attention_form,
    register_attention,
    restore_attention,
    swap_attention,
    swapped_attentions,
)
from lightning_quant.nn.attention_check import check_attentions
from lightning_quant.nn.attention_forms import WindowedAttention
from lightning_quant.nn.attention_mixin import SLOTS, QuantizedAttention
from lightning_quant.nn.layers import QuantizedLayer, register, restore, swap
from lightning_quant.nn.product import quantized_product
from lightning_quant.nn.selection import Bits, Plan, plan_layers
from lightning_quant.nn.structure import strip

__all__ = [
    "ATTENTIONS",
    "SLOTS",
    "Bits",
    "Plan",
    "QuantizedAttention",
    "QuantizedLayer",
    "WindowedAttention",
    "attention_form",
    "check_attentions",
    "plan_layers",
    "quantized_product",
    "register",
    "register_attention",
    "restore",
    "restore_attention",
    "strip",
    "swap",
    "swap_attention",
    "swapped_attentions",
]
