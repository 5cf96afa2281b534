"""A callback that ends every evaluation with what was evaluated: the quantized network, or a float one."""

from __future__ import annotations

from collections import Counter

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.functional.grid import FLOAT_BITS
from lightning_quant.nn.layers import LAYERS, QuantizedLayer
from lightning_quant.quantizers import Quantizer

_DONE = {"validate": "Validated", "test": "Tested", "predict": "Predicted"}


class WhatRan(pl.Callback):
    """Say after ``validate``, ``test`` and ``predict`` whether the network was quantized, and how far.

    The callbacks of the methods are of this class; of several in one Trainer the first one speaks.

    Example:
        >>> trainer = pl.Trainer(callbacks=[WhatRan()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Speak after the table of metrics, which Lightning prints before this."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Trainer makes it elsewhere
        if stage in _DONE and next(each for each in callbacks if isinstance(each, WhatRan)) is self:
            rank_zero_info(f"{_DONE[stage]} {quantized_share(pl_module)}.")


def quantized_share(module: nn.Module) -> str:
    """How much of a module is quantized: bit-widths of weights and activations, and the number of layers.

    Args:
        module: Module in float or quantized; quantizers without a range count as float.

    Example:
        >>> import torch
        >>> from lightning_quant.nn import swap
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> quantized_share(network)
        'in float'
        >>> layer = swap(network[0], weight_quantizer=FixedQuantizer(4))
        >>> layer.weight_quantizer.initialize(layer.weight)
        >>> quantized_share(network)
        'quantized, W4A32, 1 of 2 layers'
    """
    layers = [layer for layer in module.modules() if isinstance(layer, tuple(LAYERS))]
    found = Counter(bits for layer in layers if (bits := _bits(layer)) != _FLOAT)
    if not found:
        return "in float"
    (usual, _), *others = found.most_common()
    also = "".join(f", {count} of them {bits}" for bits, count in others)
    return f"quantized, {usual}, {found.total()} of {len(layers)} layers{also}"


_FLOAT = f"W{FLOAT_BITS}A{FLOAT_BITS}"


def _bits(layer: nn.Module) -> str:
    slots = (layer.weight_quantizer, layer.input_quantizer) if isinstance(layer, QuantizedLayer) else (None, None)
    weight, activation = (each.bits if isinstance(each, Quantizer) and each.ready else FLOAT_BITS for each in slots)
    return f"W{weight}A{activation}"
