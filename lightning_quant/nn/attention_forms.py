"""Registered attention classes, and the forms of those that need more than the redirected fused call."""

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

# These take [B, N, C] for B images and call the fused attention once.
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
    """Self- and cross-attention of diffusers, which an exchangeable processor computes."""

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Report a processor of diffusers that computes the softmax by itself or in its own kernel."""
        processor = type(getattr(module, "processor", None))
        if processor.__module__.startswith("diffusers.") and "2_0" not in processor.__name__:
            return (
                f"has the processor {processor.__name__}, which does not call F.scaled_dot_product_attention (write"
                " attention.set_processor(AttnProcessor2_0()), from diffusers.models.attention_processor)"
            )
        return super().obstacle(module)


class _Windows(QuantizedAttention):
    """Attention within windows: B images come as [B * windows, N, C], with the windows of an image in sequence."""

    def set_instances(self, images: int | None) -> None:
        """Set the number of images in a batch on the input quantizers inside that depend on it."""
        for module in self.modules():
            quantizer: Any = getattr(module, "input_quantizer", None)
            if hasattr(quantizer, "instances"):
                quantizer.instances = images

    def when_closing(self) -> None:
        self.set_instances(None)


@register_attention("timm.models.swin_transformer.WindowAttention")
class WindowedAttention(_Windows):
    """Attention that receives windows, and reads the number of images from the input of its parent.

    Attributes:
        images: Number of images in the last batch of the parent; None before.
    """

    images: int | None = None
    _hook: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the float class on x, [B * windows, N, C].

        Raises:
            ConfigurationError: The number of windows does not match the images of the parent's last batch.
        """
        if x.shape[0] % (self.images or 1):
            raise ConfigurationError(
                f"{self.float_class.__name__} got {x.shape[0]} windows, but the last batch of its parent had"
                f" {self.images} images: call the parent."
            )
        self.set_instances(self.images)
        return super().forward(x, *args, **kwargs)

    def when_swapped(self, parent: nn.Module | None) -> None:
        if parent is None or self not in parent.children():
            kind = self.float_class.__name__
            raise ConfigurationError(
                f"{kind} takes windows rather than images: pass the module that has it as a child,"
                f" swap_attention(module, ..., parent=block); found parent of type {type(parent).__name__}."
            )
        self._hook = parent.register_forward_pre_hook(_note_images, with_kwargs=True)

    def when_closing(self) -> None:
        super().when_closing()
        self._hook.remove()
        del self._hook
        vars(self).pop("images", None)


def _note_images(parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Store the number of images: a forward pre-hook without state, since the parent may be copied or pickled."""
    images = next(x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    for child in parent.children():
        if isinstance(child, WindowedAttention):
            child.images = images


@register_attention(
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
)
class ShiftedWindows(_Windows):
    """Shifted-window attention of torchvision, which cuts [B, H, W, C] into windows and calls ``F.linear`` itself."""

    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor) -> Any:
        """Map [B, H, W, C] to [B, H, W, C]."""
        self.set_instances(x.shape[0])
        with _Pieces(self) as pieces:
            # Skip the forward of QuantizedAttention, which expects a fused attention.
            output = super(QuantizedAttention, self).forward(x)
        if (pieces.linears, pieces.matmuls) != (2, 2):
            raise UnsupportedModelError(
                f"{self.float_class.__name__} ran {pieces.linears} of its 2 linears and {pieces.matmuls} of its 2"
                " products on the module's own weights: remove parametrizations of qkv and proj, or leave it in float"
                " with exclude."
            )
        return output


class _Pieces(TorchFunctionMode):
    """Mode that intercepts qkv, q k^T, softmax, attention x v and proj in the attention of torchvision."""

    MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __init__(self, attention: ShiftedWindows) -> None:
        super().__init__()
        self.attention, self.linears, self.matmuls = attention, 0, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Calls from here on are not intercepted again: neither the linear inside qkv nor the products below.
        if func is F.linear:
            for layer in (self.attention.qkv, self.attention.proj):
                if args[1] is layer.weight:
                    self.linears += 1
                    return _through(layer, args[0], *args[2:])
        # The position bias is computed before qkv, by separate layers.
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
    """Compute the output of a layer with the bias of the call, which V2 sets to 0 for the key."""
    output: Tensor = layer(x)
    if bias is None or bias is layer.bias:
        return output
    return output + (bias - layer.bias).to(output.dtype)


@register_attention(nn.MultiheadAttention)
class QuantizedMultiheadAttention(QuantizedAttention, nn.MultiheadAttention):
    """Self-attention of ``nn.MultiheadAttention``, with its packed projection as a separate layer ``in_proj``.

    The layer takes over the parameters ``in_proj_weight`` and ``in_proj_bias``; restoring gives them back. Float state
    dicts can be loaded too.
    """

    # This makes nn.TransformerEncoderLayer call its attention instead of computing it from the weights.
    switches_when_swapped = {"_qkv_same_embed_dim": False}  # noqa: RUF012
    in_proj: nn.Linear

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """Weight of the layer ``in_proj``, which ``nn.TransformerEncoder`` reads."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """Bias of the layer ``in_proj``."""
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
        """Compute self-attention, with the arguments of ``nn.MultiheadAttention``.

        Raises:
            UnsupportedModelError: The call is a cross-attention, or the input is a nested tensor.
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
        """Merge both masks (True masks a key out) into an additive one that broadcasts to [B, heads, N, N]."""
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
        """Report keys or values of other widths, added keys or values, and a subclass with its own forward."""
        if type(module).forward is not nn.MultiheadAttention.forward:
            return "is a MultiheadAttention with its own forward"
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
        # None keeps their position among the parameters.
        self._parameters.update(in_proj_weight=None, in_proj_bias=None)
        # in_proj comes before out_proj, in the order of execution.
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
