"""Back to the float network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from lightning_quant.nn.attention import close_attention, opened_attentions
from lightning_quant.nn.layers import QuantizedLayer, restore
from lightning_quant.nn.timesteps import unwatch_timesteps

Module = TypeVar("Module", bound=nn.Module)


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Name and layer of each quantized layer, each layer once."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedLayer):
            yield name, child


def strip(module: Module) -> Module:
    """Turn all quantized layers and opened attentions of a module back into float ones, in place, and return it.

    The weights are the float master weights that were trained; the state dict is that of the float network.

    >>> from lightning_quant.nn import Bits, plan_layers, swap
    >>> from lightning_quant.quantizers import LearnedQuantizer
    >>> network = nn.Sequential(nn.Linear(2, 2))
    >>> _ = swap(network[0], LearnedQuantizer(4))
    >>> list(strip(network).state_dict())
    ['0.weight', '0.bias']
    """
    unwatch_timesteps(module)
    for _, layer in list(quantized_layers(module)):
        restore(layer)
    for _, attention in list(opened_attentions(module)):
        close_attention(attention)
    return module
