"""Mixin that replaces the fused attention by a quantized one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn.quantized_module import QuantizedModule

SLOTS = ("query_quantizer", "key_quantizer", "value_quantizer", "softmax_quantizer")


class QuantizedAttention(QuantizedModule):
    """Mixin of an attention class that quantizes query, key, value and softmax.

    Instances come from :func:`swap_attention`, not from the constructor. Each of the four quantizers may be None, which
    keeps its tensor in float. During calibration, ``observer`` is called with the name of a slot and its tensor before
    the quantizer of the slot is applied; otherwise it is None.
    """

    quantizer_slots = SLOTS
    # Switches of timm: use F.scaled_dot_product_attention, and call the layer qkv rather than use its weight.
    switches_when_swapped: ClassVar[dict[str, bool]] = {"fused_attn": True, "qkv_bias_separate": True}
    query_quantizer: nn.Module | None
    key_quantizer: nn.Module | None
    value_quantizer: nn.Module | None
    softmax_quantizer: nn.Module | None
    observer: Callable[[str, Tensor], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the float class, with :meth:`attend` in place of the fused attention."""
        # Without `as`, since torch.compile would see None under that name.
        interception = _Interception(self)
        with interception:
            output = super().forward(*args, **kwargs)
        if interception.calls != 1:
            kind = self.float_class.__name__
            raise UnsupportedModelError(
                f"{kind} called F.scaled_dot_product_attention {interception.calls} times in one forward, expected 1:"
                f" register a form of {kind} that calls self.attend with the decorator"
                f" @lightning_quant.nn.register_attention({kind}), or leave it in float with exclude."
            )
        return output

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        grouped: bool = False,
    ) -> Tensor:
        """Compute softmax(scale q k^T + mask) v with the four quantizers.

        The arguments correspond to those of ``F.scaled_dot_product_attention``.

        Args:
            query: Query, [B, heads, N, d].
            key: Key, [B, heads, M, d].
            value: Value, [B, heads, M, d].
            mask: Mask that broadcasts to [B, heads, N, M]: boolean, True where a key takes part, or additive.
            scale: Factor of the scores. Default: d^-1/2.
            causal: Whether query n attends to keys 0 .. n only.
            dropout: Dropout probability of the attention after its quantizer.
            grouped: Whether key and value have fewer heads, each shared by several heads of the query.

        Returns:
            Output, [B, heads, N, d], in the dtype of ``value``.
        """
        attention = self.quantized_map(query, key, mask, scale, causal, grouped)
        value = self.quantize_slot("value_quantizer", value)
        if grouped:
            value = value.repeat_interleave(attention.shape[-3] // value.shape[-3], -3)
        return F.dropout(attention, dropout).to(value.dtype) @ value

    def quantized_map(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        causal: bool = False,
        grouped: bool = False,
    ) -> Tensor:
        """Compute the quantized softmax, [B, heads, N, M], in FP32 or FP64. See :meth:`attend` for the arguments."""
        query, key = self.quantize_slot("query_quantizer", query), self.quantize_slot("key_quantizer", key)
        if grouped:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        # Scale before the product, which could overflow in FP16.
        scores = (query * scale) @ key.transpose(-2, -1)
        if causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            mask = visible if mask is None else additive(mask, scores.dtype).masked_fill(~visible, -torch.inf)
        return self.quantized_softmax(scores, None if mask is None else additive(mask, scores.dtype))

    def quantized_softmax(self, scores: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the quantized softmax of ``scores + bias`` over the last axis. Fully masked rows are 0."""
        dtype = torch.promote_types(scores.dtype, torch.float32)
        if bias is None:
            return self.quantize_slot("softmax_quantizer", scores.softmax(-1, dtype=dtype))
        empty = bias.isneginf().all(-1, keepdim=True)
        attention = (scores + bias.masked_fill(empty, 0)).softmax(-1, dtype=dtype)
        return self.quantize_slot("softmax_quantizer", attention.masked_fill(empty, 0))

    def quantize_slot(self, slot: str, tensor: Tensor) -> Tensor:
        """Pass ``tensor`` to the observer and return it quantized by the quantizer of ``slot``."""
        if self.observer is not None:
            self.observer(slot, tensor)
        quantizer = getattr(self, slot)
        return tensor if quantizer is None else cast(Tensor, quantizer(tensor))

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Return why this module of ``float_class`` cannot be opened, or an empty string if it can."""
        if "forward" in vars(module):
            return "has a forward that was set on the module itself"
        attributes = vars(module).keys() | module._modules.keys() | module._parameters.keys() | module._buffers.keys()
        # One attribute would hide the other.
        clash = attributes & {*SLOTS, *(set(dir(QuantizedAttention)) - set(dir(nn.Module)))}
        return f"has {', '.join(sorted(clash))}, which is also a name of QuantizedAttention" if clash else ""

    def when_swapped(self, parent: nn.Module | None) -> None:
        """Run at the end of :func:`swap_attention`."""

    def when_closing(self) -> None:
        """Run at the start of :func:`restore_attention`."""


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask (True where a key takes part) to 0 and -inf. Other masks are returned unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


class _Interception(TorchFunctionMode):
    """Mode that redirects the fused attention in the forward of an attention to its ``attend``."""

    def __init__(self, attention: QuantizedAttention) -> None:
        super().__init__()
        self.attention, self.calls = attention, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        self.calls += 1
        return self._attend(*args, **kwargs or {})

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return self.attention.attend(query, key, value, attn_mask, scale, is_causal, dropout_p, enable_gqa)
