"""The attention classes that are known, and the forms of those that need more than their fused call intercepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.nn.attention import register_attention
from lightning_quant.nn.attention_mixin import QuantizedAttention, additive

# What they get is [B, N, C], B images, and they call the fused attention once.
register_attention(
    "timm.models.vision_transformer.Attention",  # up to timm 1.0.14
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.attention_pool.AttentionPoolLatent",
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
)


@register_attention("diffusers.models.attention_processor.Attention")
class ProcessedAttention(QuantizedAttention):
    """Of diffusers, self- and cross-attention: what computes it is an exchangeable processor."""

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """A processor of diffusers that computes the softmax by itself, or in a kernel of its own."""
        processor = type(getattr(module, "processor", None))
        if processor.__module__.startswith("diffusers.") and "2_0" not in processor.__name__:
            return (
                f"has the processor {processor.__name__}, which does not call F.scaled_dot_product_attention (write"
                " attention.set_processor(AttnProcessor2_0()), of diffusers.models.attention_processor)"
            )
        return super().obstacle(module)


class _Windows(QuantizedAttention):
    """Attention within windows: B images come as [B * windows, N, C], the windows of an image one after the other."""

    def set_instances(self, images: int | None) -> None:
        """Tell the quantizers of the layers within that care how many images their input holds."""
        for module in self.modules():
            quantizer: Any = getattr(module, "input_quantizer", None)
            if hasattr(quantizer, "instances"):
                quantizer.instances = images

    def when_closing(self) -> None:
        self.set_instances(None)


@register_attention("timm.models.swin_transformer.WindowAttention")
class WindowedAttention(_Windows):
    """Attention that gets windows and learns from its parent's input how many images they are of.

    Attributes:
        images: of the last batch that came to the parent; None before.
    """

    images: int | None = None
    _hook: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class, of x [B * windows, N, C].

        Raises:
            ConfigurationError: windows that are not those of the images that the parent got.
        """
        if x.shape[0] % (self.images or 1):
            raise ConfigurationError(
                f"{self.float_class.__name__} got {x.shape[0]} windows, the last batch of its parent was {self.images}"
                " images: call the parent."
            )
        self.set_instances(self.images)
        return super().forward(x, *args, **kwargs)

    def when_swapped(self, parent: nn.Module | None) -> None:
        if parent is None or self not in parent.children():
            kind = self.float_class.__name__
            raise ConfigurationError(
                f"{kind} gets windows and not images: give the module that has it as a child,"
                f" swap_attention(module, ..., parent=block), found {type(parent).__name__}."
            )
        self._hook = parent.register_forward_pre_hook(_note_images, with_kwargs=True)

    def when_closing(self) -> None:
        super().when_closing()
        self._hook.remove()
        del self._hook
        vars(self).pop("images", None)


def _note_images(parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the parent. It keeps nothing itself: the parent may be copied or pickled with it."""
    images = next(x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    for child in parent.children():
        if isinstance(child, WindowedAttention):
            child.images = images


@register_attention(
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
)
class ShiftedWindows(_Windows):
    """Torchvision's: cuts images [B, H, W, C] into windows itself, and uses the weights of its layers as functions."""

    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor) -> Any:
        """[B, H, W, C] to [B, H, W, C]."""
        self.set_instances(x.shape[0])
        with _Pieces(self) as pieces:
            # Past QuantizedAttention's, which looks for a fused attention.
            output = super(QuantizedAttention, self).forward(x)
        if (pieces.linears, pieces.matmuls) != (2, 2):
            raise UnsupportedModelError(
                f"{self.float_class.__name__} ran {pieces.linears} of its 2 linears and {pieces.matmuls} of its 2"
                " products on weights that are the module's own: remove parametrizations of qkv and proj, or leave it"
                " in float with exclude."
            )
        return output


class _Pieces(TorchFunctionMode):
    """Finds qkv, q k^T, softmax, attention x v and proj among the functions that torchvision's attention calls."""

    MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __init__(self, attention: ShiftedWindows) -> None:
        super().__init__()
        self.attention, self.linears, self.matmuls = attention, 0, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What is called from here on does not come here again: not the linear within qkv, not the products below.
        if func is F.linear:
            for layer in (self.attention.qkv, self.attention.proj):
                if args[1] is layer.weight:
                    self.linears += 1
                    return _through(layer, args[0], *args[2:])
        # The position bias is computed before qkv, by layers of its own.
        elif self.linears == 1 and func is F.softmax:
            return self.attention.quantized_softmax(args[0])
        elif self.linears == 1 and func in self.MATMULS:
            self.matmuls += 1
            return (self._scores if self.matmuls == 1 else self._output)(*args)
        return func(*args, **kwargs or {})

    def _scores(self, query: Tensor, transposed_key: Tensor) -> Tensor:
        key = self.attention.quantize_slot("key_quantizer", transposed_key.transpose(-2, -1))
        return self.attention.quantize_slot("query_quantizer", query) @ key.transpose(-2, -1)

    def _output(self, attention: Tensor, value: Tensor) -> Tensor:
        value = self.attention.quantize_slot("value_quantizer", value)
        return attention.to(value.dtype) @ value


def _through(layer: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Output of a layer for the bias that it was called with, which V2 sets to 0 for the key."""
    output: Tensor = layer(x)
    if bias is None or bias is layer.bias:
        return output
    return output + (bias - layer.bias).to(output.dtype)


@register_attention(nn.MultiheadAttention)
class QuantizedMultiheadAttention(QuantizedAttention, nn.MultiheadAttention):
    """Self-attention of ``nn.MultiheadAttention``, its packed projection a layer ``in_proj`` of its own.

    The layer takes over the Parameters ``in_proj_weight`` and ``in_proj_bias``; closing gives them back. A float state
    dict can be loaded too.
    """

    # With it nn.TransformerEncoderLayer calls its attention, and does not compute it from the weights.
    switches_when_swapped = {"_qkv_same_embed_dim": False}  # noqa: RUF012
    in_proj: nn.Linear

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """Of the layer ``in_proj``, for ``nn.TransformerEncoder`` to look at."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """Of the layer ``in_proj``."""
        return self.in_proj.bias

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``, of one tensor.

        Raises:
            UnsupportedModelError: for cross-attention and nested tensors.
        """
        self._check_input(query, key, value)
        x = query if query.dim() == 3 else query.unsqueeze(0)
        sequence_first = query.dim() == 3 and not self.batch_first
        x = x.transpose(0, 1) if sequence_first else x
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        mask = self._merged(attn_mask, key_padding_mask, x)
        attention = self.quantized_map(q, k, mask, causal=is_causal and attn_mask is None)
        attention = F.dropout(attention, self.dropout, self.training)
        v = self.quantize_slot("value_quantizer", v)
        output = self.out_proj((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        output = output.transpose(0, 1) if sequence_first else output
        weights = attention.mean(1) if average_attn_weights else attention
        if query.dim() == 2:
            output, weights = output.squeeze(0), weights.squeeze(0)
        return output, weights if need_weights else None

    def _merged(self, attn_mask: Tensor | None, padding: Tensor | None, x: Tensor) -> Tensor | None:
        """Both masks, True where a key is left out, as one of numbers to add; broadcasts to [B, heads, N, N]."""
        attn_mask, padding = (
            additive(~mask, x.dtype) if mask is not None and mask.dtype == torch.bool else mask
            for mask in (attn_mask, padding)
        )
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return attn_mask
        padding = padding.view(x.shape[0], 1, 1, -1)
        return padding if attn_mask is None else attn_mask + padding

    def _check_input(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query is not key or key is not value:
            raise UnsupportedModelError(
                "A MultiheadAttention got different tensors as query, key and value: cross-attention is not quantized."
                " Leave it in float with exclude."
            )
        if query.is_nested:
            raise UnsupportedModelError(
                "A MultiheadAttention got a nested tensor: write"
                " nn.TransformerEncoder(..., enable_nested_tensor=False)."
            )

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Keys or values of other widths, added ones, and a subclass that computes something else."""
        if type(module).forward is not nn.MultiheadAttention.forward:
            return "is a MultiheadAttention with a forward of its own"
        if vars(module)["_qkv_same_embed_dim"] is False:
            return "has a kdim or vdim other than embed_dim"
        if getattr(module, "bias_k", None) is not None or vars(module)["add_zero_attn"]:
            return "has add_bias_kv or add_zero_attn"
        return super().obstacle(module)

    def when_swapped(self, parent: nn.Module | None) -> None:
        weight, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        assert weight is not None
        layer = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=bias is not None, device="meta")
        layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
        # As None they keep their place among the parameters.
        self._parameters.update(in_proj_weight=None, in_proj_bias=None)
        # Before out_proj, in the order in which they run.
        others = dict(self._modules)
        self._modules.clear()
        self._modules.update({"in_proj": layer.train(self.training), **others})

    def when_closing(self) -> None:
        layer = self._modules.pop("in_proj")
        assert layer is not None
        self._parameters.update(in_proj_weight=layer._parameters["weight"], in_proj_bias=layer._parameters["bias"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}in_proj_{name}" in state_dict:
                state_dict[f"{prefix}in_proj.{name}"] = state_dict.pop(f"{prefix}in_proj_{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)
