"""Quantized attention, by swapping the class of a module.

A fused attention computes softmax(q k^T) v in one kernel, so its intermediate results cannot be quantized. An opened
attention runs the library's own forward, but the call of ``F.scaled_dot_product_attention`` is redirected to
``attend``, which computes it step by step and applies four quantizers: to query, key, value and softmax. As with
layers, only the class of the module changes, and :func:`restore_attention` changes it back.

The supported classes of timm, torchvision and PyTorch are in ``attention_forms``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from torch import nn

from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.nn.attention_mixin import SLOTS, QuantizedAttention
from lightning_quant.nn.forms import form_for

__all__ = [
    "ATTENTIONS",
    "SLOTS",
    "QuantizedAttention",
    "attention_form",
    "register_attention",
    "restore_attention",
    "swap_attention",
    "swapped_attentions",
]

ATTENTIONS: dict[type[nn.Module], type[QuantizedAttention]] = {}
# Forms of classes by full name, so that a library is not imported unless the network uses it.
NAMED: dict[str, type[QuantizedAttention]] = {}
# Attribute in which an opened attention stores the original values of the library's switches.
SWITCHES = "_switches_when_closed"


def register_attention(
    *classes: type[nn.Module] | str,
) -> Callable[[type[QuantizedAttention]], type[QuantizedAttention]]:
    """Register attention classes: exactly these, not their subclasses.

    A class whose forward calls ``F.scaled_dot_product_attention`` once needs only this line; a subclass of a registered
    class gets the form of that class. Used as a decorator, the line registers another form: a
    :class:`QuantizedAttention` with its own forward, or ``WindowedAttention`` for a class that receives windows,
    ``register_attention(MyAttention)(WindowedAttention)``.

    Args:
        classes: Attention classes, or their full names, ``"package.module.Class"``.

    Example:
        >>> import torch.nn.functional as F
        >>> class MyAttention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv = nn.Linear(4, 12)
        ...     def forward(self, x):
        ...         return F.scaled_dot_product_attention(*self.qkv(x).unsqueeze(1).chunk(3, -1)).squeeze(1)
        >>> _ = register_attention(MyAttention)
        >>> swap_attention(MyAttention()).observer is None
        True
    """

    def add(form: type[QuantizedAttention]) -> type[QuantizedAttention]:
        for kind in classes:
            if isinstance(kind, str):
                NAMED[kind] = form
            else:
                ATTENTIONS[kind] = form_for(kind, form, attention_form)
        return form

    for kind in classes:
        if isinstance(kind, str):
            NAMED[kind] = QuantizedAttention
        else:
            inherited = (attention_form(base) for base in kind.__mro__[1:])
            form = next(filter(None, inherited), QuantizedAttention)
            ATTENTIONS[kind] = form_for(kind, form, attention_form)
    return add


def attention_form(kind: type[nn.Module]) -> type[QuantizedAttention] | None:
    """Return the quantized form of an attention class, or None if it is not registered."""
    named = NAMED.get(f"{kind.__module__}.{kind.__qualname__}")
    if named is not None and kind not in ATTENTIONS:
        ATTENTIONS[kind] = form_for(kind, named, attention_form)
    return ATTENTIONS.get(kind)


def swap_attention(
    module: nn.Module,
    query_quantizer: nn.Module | None = None,
    key_quantizer: nn.Module | None = None,
    value_quantizer: nn.Module | None = None,
    softmax_quantizer: nn.Module | None = None,
    parent: nn.Module | None = None,
) -> QuantizedAttention:
    """Open an attention for quantization, in place.

    Args:
        module: Attention of exactly one of the registered classes.
        query_quantizer: Quantizer of the query, [B, heads, N, d]. None keeps the query in float.
        key_quantizer: Quantizer of the key, [B, heads, N, d], or None.
        value_quantizer: Quantizer of the value, [B, heads, N, d], or None.
        softmax_quantizer: Quantizer of the softmax, [B, heads, N, N], whose rows sum to 1, or None.
        parent: Module that has ``module`` as a child and receives whole images. Only windowed attention needs it.

    Raises:
        UnsupportedModelError: The class is not registered, or this module has a setting that cannot be opened.
        ConfigurationError: The attention is already open, or a windowed attention comes without its parent.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> swap_attention(attention) is attention
        True
        >>> type(attention).__name__, type(restore_attention(attention)).__name__
        ('QuantizedMultiheadAttention', 'MultiheadAttention')
    """
    kind = type(module)
    if isinstance(module, QuantizedAttention):
        raise ConfigurationError(
            f"This {module.float_class.__name__} is already open: write restore_attention(module) first."
        )
    form = attention_form(kind)
    if form is None:
        raise UnsupportedModelError(unknown_class(kind, kind.__name__))
    if form.obstacle(module):
        raise UnsupportedModelError(f"This {kind.__name__} {form.obstacle(module)}: it cannot be opened.")
    module.__class__ = form
    attention = cast(QuantizedAttention, module)
    try:
        attention.when_swapped(parent)
    except Exception:
        module.__class__ = kind
        raise
    old = {name: getattr(module, name) for name in form.switches_when_swapped if hasattr(module, name)}
    vars(module)[SWITCHES] = old
    vars(module).update({name: form.switches_when_swapped[name] for name in old})
    device = next((parameter.device for parameter in module.parameters()), None)
    quantizers = (query_quantizer, key_quantizer, value_quantizer, softmax_quantizer)
    for slot, quantizer in zip(SLOTS, quantizers, strict=True):
        module.register_module(slot, quantizer)
        if quantizer is not None:
            quantizer.to(device).train(module.training)
    return attention


def restore_attention(module: nn.Module) -> nn.Module:
    """Turn an opened attention back into a float attention, with its current weights.

    Raises:
        ConfigurationError: The module is not open.
    """
    if not isinstance(module, QuantizedAttention):
        raise ConfigurationError(f"This {type(module).__name__} is not an opened attention.")
    module.when_closing()
    for slot in SLOTS:
        delattr(module, slot)
    vars(module).update(vars(module).pop(SWITCHES))
    vars(module).pop("observer", None)
    module.__class__ = module.float_class  # type: ignore[assignment]
    return module


def swapped_attentions(module: nn.Module) -> Iterator[tuple[str, QuantizedAttention]]:
    """Iterate over the name and module of each opened attention, each once."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedAttention):
            yield name, child


def unknown_class(kind: type[nn.Module], name: str) -> str:
    """Return the error message for an attention class that is not registered."""
    line = f"lightning_quant.nn.register_attention({kind.__name__})"
    return (
        f"{name} is a {kind.__module__}.{kind.__qualname__}, an attention class that is not registered. If its forward"
        f" calls F.scaled_dot_product_attention once, write {line} first; if not, use that line as the decorator of a"
        f' QuantizedAttention whose forward calls self.attend; or leave it in float with exclude=["{name}"].'
    )
