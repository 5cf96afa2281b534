"""Networks inside a LightningModule: trained ones, frozen helpers, and copies of other networks."""

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
    """Roles of the layers of a module in its training, by layer name.

    Attributes:
        owner: Network to which a layer belongs, if the module trains several networks separately.
        frozen: Part of the module without trainable parameters that contains a layer.
        original: Layer of which a layer is a copy, for example in an average of the network.
    """

    owner: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)


def networks_of(module: nn.Module) -> Networks:
    """Identify the networks of a LightningModule from its direct parts. Any other module is a single trained network.

    All trained parts are one network, since Lightning steps a single optimizer; with manual optimization each part is
    a network. A part is a copy if its layers have the values of a trained part, and it is trained itself or can be
    updated from another module, as averages can.

    Example:
        >>> class Perceptual(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net, self.vgg = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
        >>> networks_of(Perceptual()).frozen
        {'vgg': 'vgg'}
    """
    networks, training = Networks(), dict[str, Layers]()
    if not isinstance(module, pl.LightningModule):
        return networks
    for name, part, layers in _parts(module):
        # Quantized layers were trained when they were quantized.
        trains = any(p.requires_grad for p in part.parameters()) or _is_quantized(layers)
        original = next((other for other in training.values() if _same(layers, other)), None)
        if original is not None and (trains or _is_updated(part)):
            networks.original.update({copy: layer for (copy, _), (layer, _) in zip(layers, original, strict=True)})
        elif trains:
            training[name] = layers
        else:
            networks.frozen.update({layer: name for layer, _ in layers})
    if not training:
        networks.frozen.clear()
    if not module.automatic_optimization:
        networks.owner.update({layer: name for name, layers in training.items() for layer, _ in layers})
    return networks


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module, Layers]]:
    """Iterate over the name, part and layers of each direct part that has layers, each layer once."""
    seen, kinds = set[nn.Module](), tuple(LAYERS)
    for name, part in _children(module):
        modules = [(f"{name}.{below}".rstrip("."), child) for below, child in part.named_modules()]
        layers = [(layer, child) for layer, child in modules if isinstance(child, kinds) and child not in seen]
        seen.update(child for _, child in layers)
        if layers:
            yield name, part, layers


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the children, descending into children that are only containers with named entries."""
    for name, child in module.named_children():
        if isinstance(child, pl.LightningModule | nn.ModuleDict):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _is_updated(part: nn.Module) -> bool:
    """Return whether a part has the method of an average: ``update_parameters`` in PyTorch, ``update`` in timm."""
    return any(callable(getattr(part, method, None)) for method in ("update_parameters", "update"))


def _same(first: Layers, second: Layers) -> bool:
    """Return whether two parts with several layers match: same structure, and equal weights unless quantized."""
    if len(first) < 2 or [_structure(layer) for _, layer in first] != [_structure(layer) for _, layer in second]:
        return False
    if _is_quantized(first):
        return True
    return all(_equal(weight_of(a), weight_of(b)) for (_, a), (_, b) in zip(first, second, strict=True))


def _is_quantized(layers: Layers) -> bool:
    return any(isinstance(layer, QuantizedLayer) for _, layer in layers)


def _structure(layer: nn.Module) -> tuple[object, ...]:
    bits = [getattr(getattr(layer, slot, None), "bits", None) for slot in QUANTIZERS]
    return type_before_parametrizations(layer), getattr(weight_of(layer), "shape", None), *bits


def _equal(a: object, b: object) -> bool:
    """Return whether two unsharded tensors that have values are equal."""
    tensors = [x for x in (a, b) if isinstance(x, Tensor) and not x.is_meta and not hasattr(x, "full_tensor")]
    return len(tensors) == 2 and torch.equal(*tensors)
