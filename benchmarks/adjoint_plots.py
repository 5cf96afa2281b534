"""Pictures of the adjoints of AccuQuant: memory and direction of the gradients over the window length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.plotting import (
    GRAY,
    Values,
    color,
    finish,
    label_ends,
    line_style,
    panels,
    scale_values,
    short,
    wrapped,
)
from lightning_quant.report.windows import by_window, tick_windows

_MEGA = 1e6


def draw_memory(
    peaks: Mapping[str, Mapping[int, float]],
    path: Path | None = None,
    title: str = "Peak memory of one update over the window length",
) -> Figure:
    r"""Draw the peak memory over the window length, a line an adjoint, with its growth from shortest to longest.

    Args:
        peaks: bytes by window length M by the name of the adjoint.
        path: of the picture, whose ending decides the format (.png, .svg, .pdf); None saves nothing.
        title: above the picture.

    Raises:
        ConfigurationError: no adjoint, or one without a window.

    Example:
        >>> figure = draw_memory({"identity": {1: 2e6, 20: 2e6}, "bptt": {1: 2e6, 20: 40e6}})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['identity\n2.00 MB (x1.00)', 'bptt\n40.0 MB (x20.0)']
    """
    figure, (axes,) = panels(1)
    ends, windows = [], set[int]()
    for order, (name, peak) in enumerate(_named(peaks, "adjoint").items()):
        means = {window: float(values.mean()) / _MEGA for window, values in by_window(peak, name).items()}
        windows.update(means)
        _line(axes, means, order)
        first, *_, last = [*means.values()] * 2
        growth = last / first if first else math.nan
        ends.append((max(means), last, f"{wrapped(name)}\n{short(last)} MB (x{short(growth)})", color(order)))
    scale_values(axes, _heights(axes))
    tick_windows(axes, sorted(windows))
    label_ends(axes, ends)
    axes.set_title("in brackets: longest window over shortest", fontsize=10, loc="left", color=GRAY)
    axes.set_xlabel("window length M (denoising steps)")
    axes.set_ylabel("peak memory (MB)")
    return finish(figure, path, title)


def draw_gradient_cosines(
    cosines: Mapping[str, Mapping[int, Values]],
    path: Path | None = None,
    title: str = "Cosine to the gradient of back-propagation",
) -> Figure:
    r"""Draw how well the gradient of each adjoint points where back-propagation does.

    Each window length has a slot of its own, in which the positions along the trajectory stand from left (noise) to
    right (image). What stands at the end is of the longest window.

    Args:
        cosines: by window length M by the name of the adjoint; one number, or one for each position.
        path: of the picture, whose ending decides the format (.png, .svg, .pdf); None saves nothing.
        title: above the picture.

    Raises:
        ConfigurationError: no adjoint, or one without a window.

    Example:
        >>> cosines = {"identity": {1: 1.0, 4: [0.96, 0.98]}, "per_step": {1: 1.0, 4: [-0.2, 0.4]}}
        >>> figure = draw_gradient_cosines(cosines)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['identity\nmean 0.97', 'per_step\nmean 0.10']
    """
    found = {name: by_window(each, name) for name, each in _named(cosines, "adjoint").items()}
    windows = sorted({window for each in found.values() for window in each})
    figure, (axes,) = panels(1)
    ends = []
    for order, (name, each) in enumerate(found.items()):
        slots = {windows.index(window): values for window, values in each.items()}
        _positions(axes, slots, order)
        slot, last = max(slots.items())
        word = "mean " if len(last) > 1 else ""
        ends.append((_places(slot, len(last))[-1], last[-1], f"{wrapped(name)}\n{word}{last.mean():.2f}", color(order)))
    for slot in range(1, len(windows)):
        axes.axvline(slot - 0.5, color="#DDDDDD", linewidth=0.6, zorder=0)
    lowest = min(float(values.min()) for each in found.values() for values in each.values())
    axes.set_ylim(min(0.0, lowest - 0.05), 1.05)
    axes.set_xlim(-0.5, len(windows) - 0.5)
    axes.axhline(0, color=GRAY, linewidth=0.8, zorder=1)
    axes.set_xticks(range(len(windows)), [str(window) for window in windows])
    axes.tick_params(axis="x", length=0)
    label_ends(axes, ends)
    several = any(len(values) > 1 for each in found.values() for values in each.values())
    within = "\nwithin each: positions from noise (left) to image (right)" if several else ""
    axes.set_xlabel(f"window length M (denoising steps){within}")
    axes.set_ylabel("cosine (1: same direction)")
    return finish(figure, path, title)


def _named(given: Mapping[str, Mapping[int, Values]], what: str) -> Mapping[str, Mapping[int, Values]]:
    if not given:
        raise ConfigurationError(f"No {what} to draw: give at least one, by its name.")
    return given


def _line(axes: Axes, means: Mapping[int, float], order: int) -> None:
    axes.plot(list(means), list(means.values()), linewidth=1.8, markersize=5, **line_style(order))


def _heights(axes: Axes) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])


def _places(slot: int, count: int) -> NDArray[np.float64]:
    """From left to right in the slot; one alone in its middle."""
    return slot + (np.linspace(-0.36, 0.36, count) if count > 1 else np.zeros(1))


def _positions(axes: Axes, slots: Mapping[int, NDArray[np.float64]], order: int) -> None:
    """A line in each slot; one through all where each has a single number."""
    if all(len(values) == 1 for values in slots.values()):
        axes.plot(list(slots), np.concatenate(list(slots.values())), linewidth=1.8, markersize=5, **line_style(order))
        return
    for slot, values in slots.items():
        axes.plot(_places(slot, len(values)), values, linewidth=1.2, markersize=3.5, **line_style(order))
