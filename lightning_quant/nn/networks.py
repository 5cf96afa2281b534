"""The networks that a LightningModule holds: those that train, frozen helpers, and copies of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_quant.nn.forms import weight_of
from lightning_quant.nn.layers import LAYERS, QUANTIZERS, QuantizedLayer

Layers = Sequence[tuple[str, nn.Module]]


@dataclass
class Networks:
    """What the layers of a module are to its training, each by name.

    Attributes:
        owner: The network that a layer is part of, where the module trains several one by one.
        frozen: The part of the module, no parameter of which trains, that a layer lies in.
        original: The layer that a layer copies, as that of an average of the network does.
    """

    owner: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)


def networks_of(module: nn.Module) -> Networks:
    """Tell the networks of a LightningModule apart, by its direct parts; any other module is one network that trains.

    All that trains is one network, since Lightning steps one optimizer by itself; with manual optimization each part
    is one. A part is a copy where its layers have the values of another's: of one that trains, and it trains itself or
    can be updated from another module, as averages can.

    Example:
        >>> class Perceptual(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net, self.vgg = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
        >>> networks_of(Perceptual()).frozen
        {'vgg': 'vgg'}
    """
    found, training = Networks(), dict[str, Layers]()
    if not isinstance(module, pl.LightningModule):
        return found
    for name, part, layers in _parts(module):
        # What was quantized trained then.
        trains = any(p.requires_grad for p in part.parameters()) or _is_quantized(layers)
        original = next((other for other in training.values() if _same(layers, other)), None)
        if original is not None and (trains or _is_updated(part)):
            found.original.update({copy: layer for (copy, _), (layer, _) in zip(layers, original, strict=True)})
        elif trains:
            training[name] = layers
        else:
            found.frozen.update({layer: name for layer, _ in layers})
    if not training:
        found.frozen.clear()
    if not module.automatic_optimization:
        found.owner.update({layer: name for name, layers in training.items() for layer, _ in layers})
    return found


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module, Layers]]:
    """Name, part and layers of the direct parts of a module that have layers, each layer once."""
    seen, kinds = set[nn.Module](), tuple(LAYERS)
    for name, part in _children(module):
        modules = [(f"{name}.{below}".rstrip("."), child) for below, child in part.named_modules()]
        layers = [(layer, child) for layer, child in modules if isinstance(child, kinds) and child not in seen]
        seen.update(child for _, child in layers)
        if layers:
            yield name, part, layers


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children, and those of a child that only holds others by their names."""
    for name, child in module.named_children():
        if isinstance(child, pl.LightningModule | nn.ModuleDict):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _is_updated(part: nn.Module) -> bool:
    """Whether it is an average by its methods: ``update_parameters`` is PyTorch's, ``update`` timm's."""
    return any(callable(getattr(part, method, None)) for method in ("update_parameters", "update"))


def _same(some: Layers, others: Layers) -> bool:
    """Whether two parts of several layers are alike, and have equal weights or, once they are trained, quantizers."""
    if len(some) < 2 or [_structure(layer) for _, layer in some] != [_structure(layer) for _, layer in others]:
        return False
    if _is_quantized(some):
        return True
    return all(_equal(weight_of(one), weight_of(other)) for (_, one), (_, other) in zip(some, others, strict=True))


def _is_quantized(layers: Layers) -> bool:
    return any(isinstance(layer, QuantizedLayer) for _, layer in layers)


def _structure(layer: nn.Module) -> tuple[object, ...]:
    bits = [getattr(getattr(layer, slot, None), "bits", None) for slot in QUANTIZERS]
    return type_before_parametrizations(layer), getattr(weight_of(layer), "shape", None), *bits


def _equal(one: object, other: object) -> bool:
    """Whether two whole tensors that have values are equal."""
    both = [x for x in (one, other) if isinstance(x, Tensor) and not x.is_meta and not hasattr(x, "full_tensor")]
    return len(both) == 2 and torch.equal(*both)
