"""Which attentions of a network are known, before anything changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn.attention import attention_form, unknown_class
from lightning_quant.nn.attention_mixin import QuantizedAttention
from lightning_quant.nn.selection import matches


def check_attentions(module: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Names of the attentions that can be opened, in the order of registration.

    Args:
        module: the network.
        exclude: Patterns of the names of modules that stay in float with all below them, see
            :func:`~lightning_quant.nn.selection.matches`.

    Raises:
        UnsupportedModelError: no attention at all; one whose class is not known, or that cannot be opened.

    Example:
        >>> check_attentions(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)))
        ['1']
    """
    found = list(find_attentions(module))
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no attention: give a network with attention, such as a vision transformer of"
            " timm or torchvision. An attention class of your own that calls F.scaled_dot_product_attention is made"
            " known by lightning_quant.nn.register_attention(ItsClass)."
        )
    taken = [(name, child) for name, child in found if not matches(name, exclude)]
    for name, child in taken:
        form = attention_form(type(child))
        if isinstance(child, QuantizedAttention):
            continue
        if form is None:
            raise UnsupportedModelError(unknown_class(type(child), name or type(child).__name__))
        if form.obstacle(child):
            raise UnsupportedModelError(
                f"{name or type(child).__name__} is a {type(child).__name__} that {form.obstacle(child)}: it cannot be"
                f' opened. Leave it in float with exclude=["{name}"].'
            )
    return [name for name, _ in taken]


def find_attentions(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the attentions that are known, and of the innermost modules that look like one."""
    modules = list(_outside_metrics(module))
    known = {name for name, child in modules if _is_known(child)}
    likely = {name for name, child in modules if name in known or _looks_like(child)}
    for name, child in modules:
        within = name and f"{name}."
        if name in known or (name in likely and not any(n != name and n.startswith(within) for n in likely)):
            yield name, child


def _is_known(module: nn.Module) -> bool:
    return isinstance(module, QuantizedAttention) or attention_form(type(module)) is not None


def _looks_like(module: nn.Module) -> bool:
    """By its name, and that it computes with weights."""
    return (
        re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None
        and type(module).forward is not nn.Module.forward
        and (bool(module._parameters) or any(isinstance(child, nn.Linear) for child in module.modules()))
    )


def _outside_metrics(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all but metrics and what is within: they judge the network and are no part of it."""
    closed: list[str] = []
    for name, child in module.named_modules():
        if any(base.__module__.startswith("torchmetrics.") for base in type(child).__mro__):
            closed.append(name and f"{name}.")
        elif not any(name.startswith(prefix) for prefix in closed):
            yield name, child
