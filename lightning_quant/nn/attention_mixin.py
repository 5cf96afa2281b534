"""What an opened attention does in place of the fused one."""

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
    """Mixin of an attention class: quantizes query, key, value and softmax.

    Made by :func:`swap_attention`, never called. Each of the four quantizers may be None, which leaves its tensor in
    float. ``observer`` is called with the name of the slot and the tensor before the slot's quantizer acts; None
    outside calibration.
    """

    quantizer_slots = SLOTS
    # Of timm: the way through F.scaled_dot_product_attention, and through the layer qkv and not its bare weight.
    switches_when_swapped: ClassVar[dict[str, bool]] = {"fused_attn": True, "qkv_bias_separate": True}
    query_quantizer: nn.Module | None
    key_quantizer: nn.Module | None
    value_quantizer: nn.Module | None
    softmax_quantizer: nn.Module | None
    observer: Callable[[str, Tensor], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class does, with :meth:`attend` in place of the fused attention."""
        # Not `as`: to the compiler of PyTorch that name would be None.
        interception = _Interception(self)
        with interception:
            output = super().forward(*args, **kwargs)
        if interception.calls != 1:
            kind = self.float_class.__name__
            raise UnsupportedModelError(
                f"{kind} called F.scaled_dot_product_attention {interception.calls} times in one forward, expected 1:"
                f" register a form of {kind} that calls self.attend, with"
                f" @lightning_quant.nn.register_attention({kind}) above it, or leave it in float with exclude."
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
        """softmax(scale q k^T + mask) v with the four quantizers; arguments as ``F.scaled_dot_product_attention``.

        Args:
            query: [B, heads, N, d].
            key: [B, heads, M, d].
            value: [B, heads, M, d].
            mask: broadcasts to [B, heads, N, M]; True where a key takes part, or numbers to add.
            scale: default d^-1/2.
            causal: query n sees keys 0 .. n.
            dropout: probability, of the attention after its quantizer.
            grouped: key and value have fewer heads, each for several of the query's.

        Returns:
            [B, heads, N, d], in the dtype of ``value``.
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
        """The quantized softmax, [B, heads, N, M], in FP32 or FP64; arguments as of :meth:`attend`."""
        query, key = self.quantize_slot("query_quantizer", query), self.quantize_slot("key_quantizer", key)
        if grouped:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        # Scaled first: the product of FP16 tensors could overflow.
        scores = (query * scale) @ key.transpose(-2, -1)
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            mask = seen if mask is None else additive(mask, scores.dtype).masked_fill(~seen, -torch.inf)
        return self.quantized_softmax(scores, None if mask is None else additive(mask, scores.dtype))

    def quantized_softmax(self, scores: Tensor, bias: Tensor | None = None) -> Tensor:
        """The quantized softmax of ``scores + bias`` over the last axis; 0 where the bias leaves nothing of a row."""
        dtype = torch.promote_types(scores.dtype, torch.float32)
        if bias is None:
            return self.quantize_slot("softmax_quantizer", scores.softmax(-1, dtype=dtype))
        empty = bias.isneginf().all(-1, keepdim=True)
        attention = (scores + bias.masked_fill(empty, 0)).softmax(-1, dtype=dtype)
        return self.quantize_slot("softmax_quantizer", attention.masked_fill(empty, 0))

    def quantize_slot(self, slot: str, tensor: Tensor) -> Tensor:
        """``tensor`` after the observer saw it and the quantizer of ``slot`` acted on it."""
        if self.observer is not None:
            self.observer(slot, tensor)
        quantizer = getattr(self, slot)
        return tensor if quantizer is None else cast(Tensor, quantizer(tensor))

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Why this module of ``float_class`` cannot be opened; empty where it can."""
        if "forward" in vars(module):
            return "has a forward that was set on the module itself"
        own = vars(module).keys() | module._modules.keys() | module._parameters.keys() | module._buffers.keys()
        # Either would hide the other.
        clash = own & {*SLOTS, *(set(dir(QuantizedAttention)) - set(dir(nn.Module)))}
        return f"has {', '.join(sorted(clash))}, which is also a name of QuantizedAttention" if clash else ""

    def when_swapped(self, parent: nn.Module | None) -> None:
        """Called at the end of :func:`swap_attention`."""

    def when_closing(self) -> None:
        """Called at the start of :func:`restore_attention`."""


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask, True where a key takes part, as numbers to add: 0 and -inf. Others as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


class _Interception(TorchFunctionMode):
    """Sends the fused attention that is called in an attention's forward to its ``attend``."""

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
