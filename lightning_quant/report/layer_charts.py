"""Pictures of the cost of each layer and of the signal-to-noise ratio of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_quant.analysis.layers import LayerAnalysis
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.plotting import color, finish, wrapped

# Maximum number of bars that is still readable.
MOST = 25


def draw_sensitivity(layers: Sequence[LayerAnalysis], error: float | None, path: Path | None = None) -> Figure:
    """Draw the error of each layer alone, and the gain of leaving it in float, with the worst layer on top.

    For a network that was trained quantized, draw how far its outputs move without the quantizers of each layer.

    Args:
        layers: Layers measured one by one; layers without a measurement are not drawn.
        error: Error of the outputs with all layers quantized; None if there is no float network.
        path: File of the picture; None saves nothing.

    Raises:
        ConfigurationError: No layer was measured.

    Example:
        >>> figure = draw_sensitivity([LayerAnalysis("fc", "Linear", (8, 8), 0, {}, 0.1, 0.02)], error=0.11)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['fc']
    """
    measured = [layer for layer in layers if layer.cost is not None]
    if not measured:
        raise ConfigurationError("No layer was measured one by one: write sensitivity=True.")
    worst = sorted(measured, key=_loss)[-MOST:]
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(worst)), dpi=110, layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(worst))
    compared = error is not None and all(layer.only_float is not None for layer in worst)
    label, quantity = ("only this layer quantized", "error") if compared else ("its quantizers removed", "change")
    axes.barh(at + 0.2 * compared, list(map(_loss, worst)), 0.4, color=color(0), label=label)
    if compared:
        gains = [max((error or 0.0) - (layer.only_float or 0.0), 0.0) for layer in worst]
        axes.barh(at - 0.2, gains, 0.4, color=color(1), label="gain with only this layer in float")
    axes.set_yticks(at, [layer.name for layer in worst], fontsize=8)
    axes.set_xlabel(f"{quantity} of the network's outputs, relative to their norm")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    omitted = len(measured) - len(worst)
    note = f" ({omitted} that cost less are not drawn)" if omitted else ""
    return finish(figure, path, f"Cost of each layer{note}")


def draw_noise(layers: Sequence[LayerAnalysis], path: Path | None = None) -> Figure:
    """Draw the signal-to-quantization-noise ratio of every tensor, from the first layer to the last.

    Raises:
        ConfigurationError: No quantized tensor.

    Example:
        >>> draw_noise([])
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: No quantized tensor to draw.
    """
    slots = list(dict.fromkeys(slot for layer in layers for slot in layer.tensors))
    if not slots:
        raise ConfigurationError("No quantized tensor to draw.")
    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for order, slot in enumerate(slots):
        points = [(at, layer.tensors[slot].sqnr) for at, layer in enumerate(layers) if slot in layer.tensors]
        places, values = zip(*points, strict=True)
        marker = "os^Dv<"[order % 6]
        axes.plot(places, values, marker, markersize=4, color=color(order), label=wrapped(slot))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("quantized layers and attentions, in network order")
    axes.set_ylabel("SQNR (dB)")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=min(len(slots), 6), loc="lower left", bbox_to_anchor=(0, 1))
    return finish(figure, path, "")


def _loss(layer: LayerAnalysis) -> float:
    return layer.cost or 0.0
