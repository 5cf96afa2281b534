"""Callback that reports after each evaluation whether the evaluated network was quantized."""

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
    """Reports after ``validate``, ``test`` and ``predict`` whether and how far the network was quantized.

    The callbacks of all methods derive from this class. If a Trainer has several of them, only the first one reports.

    Example:
        >>> trainer = pl.Trainer(callbacks=[WhatRan()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Report after the table of metrics, which Lightning prints earlier."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Trainer makes it elsewhere
        if stage in _DONE and next(callback for callback in callbacks if isinstance(callback, WhatRan)) is self:
            rank_zero_info(f"{_DONE[stage]} {quantized_share(pl_module)}.")


def quantized_share(module: nn.Module) -> str:
    """Describe how much of a module is quantized: bit-widths of weights and activations, and the number of layers.

    Args:
        module: Float or quantized module. Quantizers without a range count as float.

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
    counts = Counter(bits for layer in layers if (bits := _bits(layer)) != _FLOAT)
    if not counts:
        return "in float"
    (usual, _), *others = counts.most_common()
    exceptions = "".join(f", {count} of them {bits}" for bits, count in others)
    return f"quantized, {usual}, {counts.total()} of {len(layers)} layers{exceptions}"


_FLOAT = f"W{FLOAT_BITS}A{FLOAT_BITS}"


def _bits(layer: nn.Module) -> str:
    quantizers = (layer.weight_quantizer, layer.input_quantizer) if isinstance(layer, QuantizedLayer) else (None, None)
    weight, activation = (q.bits if isinstance(q, Quantizer) and q.ready else FLOAT_BITS for q in quantizers)
    return f"W{weight}A{activation}"
