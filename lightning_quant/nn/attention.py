"""Attention with its softmax in the open, by a change of class.

A fused attention computes softmax(q k^T) v in one kernel, where nothing between can be quantized. An opened attention
runs the library's own forward, but its call of ``F.scaled_dot_product_attention`` comes to ``attend``, which
computes it step by step and lets four quantizers act: on query, key, value and softmax. As with layers, only the class
of the module is exchanged, and exchanged back by :func:`restore_attention`.

Which classes of timm, torchvision and PyTorch are known stands in ``attention_forms``.
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
# Forms of classes by their full name: a network that has one of them has imported its library, nobody else needs to.
NAMED: dict[str, type[QuantizedAttention]] = {}
# Where an opened attention keeps the library's switches as they were.
SWITCHES = "_switches_when_closed"


def register_attention(
    *classes: type[nn.Module] | str,
) -> Callable[[type[QuantizedAttention]], type[QuantizedAttention]]:
    """Make attention classes known, exactly these and not their subclasses.

    A class whose forward calls ``F.scaled_dot_product_attention`` once needs this line and no more; a subclass of a
    known one gets the form of that. As a decorator the line gives another form: a :class:`QuantizedAttention` with a
    forward of its own, or ``WindowedAttention`` for a class that gets windows, by
    ``register_attention(MyAttention)(WindowedAttention)``.

    Args:
        classes: attention classes, or their full names, ``"package.module.Class"``.

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
    """The quantized form of an attention class; None where it is not known."""
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
    """Open an attention, in place.

    Args:
        module: of one of the known classes exactly.
        query_quantizer: acts on [B, heads, N, d]; None leaves the query in float, and so for the others.
        key_quantizer: see above.
        value_quantizer: see above.
        softmax_quantizer: acts on [B, heads, N, N], rows sum to 1.
        parent: the module that has ``module`` as a child and gets whole images; only windowed attention needs it.

    Raises:
        UnsupportedModelError: a class that is not known, or a setting of it that cannot be opened.
        ConfigurationError: an attention that is open already; a windowed one without its parent.

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
            f"This {module.float_class.__name__} is open already: write restore_attention(module) first."
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
    """Turn an opened attention back into the float attention it was, with the weights it has now.

    Raises:
        ConfigurationError: a module that is not open.
    """
    if not isinstance(module, QuantizedAttention):
        raise ConfigurationError(f"This {type(module).__name__} is not an opened attention: nothing to close.")
    module.when_closing()
    for slot in SLOTS:
        delattr(module, slot)
    vars(module).update(vars(module).pop(SWITCHES))
    vars(module).pop("observer", None)
    module.__class__ = module.float_class  # type: ignore[assignment]
    return module


def swapped_attentions(module: nn.Module) -> Iterator[tuple[str, QuantizedAttention]]:
    """Name and module of each opened attention, each once."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedAttention):
            yield name, child


def unknown_class(kind: type[nn.Module], name: str) -> str:
    """The sentence on an attention class that is not registered."""
    line = f"lightning_quant.nn.register_attention({kind.__name__})"
    return (
        f"{name} is a {kind.__module__}.{kind.__qualname__}, an attention that is not known. If its forward calls"
        f" F.scaled_dot_product_attention once, write {line} first; if not, give the line as a decorator to a"
        " QuantizedAttention whose forward calls self.attend; or leave it in float with"
        f' exclude=["{name}"].'
    )
