"""Check of the attentions of a network, before anything changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn.attention import attention_form, unknown_class
from lightning_quant.nn.attention_mixin import QuantizedAttention
from lightning_quant.nn.selection import matches


def check_attentions(module: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Return the names of the attentions to open, in the order of registration.

    Args:
        module: Network with attentions.
        exclude: Name patterns of modules that stay in float with all their submodules, see
            :func:`~lightning_quant.nn.selection.matches`.

    Raises:
        UnsupportedModelError: There is no attention, or one is not registered or cannot be opened.

    Example:
        >>> check_attentions(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)))
        ['1']
    """
    attentions = list(find_attentions(module))
    if not attentions:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no attention: use a network with attention, such as a vision transformer of"
            " timm or torchvision. If you have your own attention class that calls F.scaled_dot_product_attention,"
            " write lightning_quant.nn.register_attention(ItsClass) first."
        )
    selected = [(name, child) for name, child in attentions if not matches(name, exclude)]
    for name, child in selected:
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
    return [name for name, _ in selected]


def find_attentions(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the registered attentions, and the innermost modules that look like one, with their names."""
    modules = list(_outside_metrics(module))
    registered = {name for name, child in modules if _is_registered(child)}
    likely = {name for name, child in modules if name in registered or _looks_like(child)}
    for name, child in modules:
        within = name and f"{name}."
        if name in registered or (name in likely and not any(n != name and n.startswith(within) for n in likely)):
            yield name, child


def _is_registered(module: nn.Module) -> bool:
    return isinstance(module, QuantizedAttention) or attention_form(type(module)) is not None


def _looks_like(module: nn.Module) -> bool:
    """Return whether a module is an attention, judged by its class name and by having weights and a forward."""
    return (
        re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None
        and type(module).forward is not nn.Module.forward
        and (bool(module._parameters) or any(isinstance(child, nn.Linear) for child in module.modules()))
    )


def _outside_metrics(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over all modules outside metrics, which evaluate the network and are not part of it."""
    closed: list[str] = []
    for name, child in module.named_modules():
        if any(base.__module__.startswith("torchmetrics.") for base in type(child).__mro__):
            closed.append(name and f"{name}.")
        elif not any(name.startswith(prefix) for prefix in closed):
            yield name, child
