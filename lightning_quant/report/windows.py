"""Picture of the final error of a trajectory over the window length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.plotting import (
    GRAY,
    Values,
    color,
    finish,
    label_ends,
    numbers,
    panels,
    scale_values,
    short,
)

# Minimum distance of two ticks, as a share of the axis.
_TICK_GAP = 0.05


def draw_window_sweep(
    errors: Mapping[int, Values],
    path: Path | None = None,
    title: str = "Final error over the window length",
    chosen: int | None = None,
    calls: int | None = None,
    before: float | None = None,
) -> Figure:
    """Draw the final error of a trajectory over the window length, with a point per seed and a line for their mean.

    Args:
        errors: RMSE to the float sample, one value or one per seed, keyed by window length M.
        path: File of the picture, whose suffix sets the format (.png, .svg, .pdf); None saves nothing.
        title: Title above the picture.
        chosen: Window length to mark; None marks the one with the lowest mean.
        calls: Number of network calls of each calibration, equal for all; None writes only that it is equal.
        before: Error before the calibration, drawn as a reference line.

    Raises:
        ConfigurationError: No window, a window without an error, or a chosen window that was not tried.

    Example:
        >>> figure = draw_window_sweep({1: 0.170, 4: [0.108, 0.112], 10: 0.140}, calls=4800)
        >>> figure.axes[0].get_title(loc="left")
        'lowest at M = 4: 0.110, each with 4,800 network calls'
    """
    seeds = by_window(errors, "window sweep")
    means = {window: float(values.mean()) for window, values in seeds.items()}
    marked = _marked(means, chosen)
    figure, (axes,) = panels(1)
    for window, values in seeds.items():
        if len(values) > 1:
            axes.plot([window] * len(values), values, "o", color=color(0), markersize=4, alpha=0.45, linewidth=0)
    axes.plot(list(means), list(means.values()), "-o", color=color(0), linewidth=1.8, markersize=5)
    _ring(axes, marked, means[marked])
    values_drawn = np.concatenate([*seeds.values(), [] if before is None else [before]])
    scale_values(axes, values_drawn)
    tick_windows(axes, list(means))
    if before is not None:
        axes.axhline(before, color=GRAY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        label_ends(axes, [(axes.get_xlim()[1], before, f"before\n{short(before)}", GRAY)])
    word = "lowest at" if chosen is None else "chosen:"
    cost = "with equal network calls" if calls is None else f"each with {calls:,} network calls"
    axes.set_title(f"{word} M = {marked}: {short(means[marked])}, {cost}", fontsize=10, loc="left", color=GRAY)
    axes.set_xlabel("window length M (denoising steps)")
    runs = max(len(values) for values in seeds.values())
    axes.set_ylabel("RMSE to the float sample" + (f"\n(points: {runs} seeds, line: mean)" if runs > 1 else ""))
    return finish(figure, path, title)


def by_window(given: Mapping[int, Values], name: str) -> dict[int, NDArray[np.float64]]:
    """Convert the numbers of each window to arrays, shortest window first."""
    arrays = {window: numbers(given[window]).reshape(-1) for window in sorted(given)}
    empty = [window for window, values in arrays.items() if not len(values)]
    if not arrays or empty:
        raise ConfigurationError(
            f"{name}: no number {f'for the window {empty[0]}' if empty else 'at all'}: expected one or several"
            " numbers per window length."
        )
    return arrays


def _marked(means: Mapping[int, float], chosen: int | None) -> int:
    if chosen is None:
        return min(means, key=lambda window: means[window])
    if chosen not in means:
        raise ConfigurationError(f"chosen={chosen} is not in the sweep: expected one of {', '.join(map(str, means))}.")
    return chosen


def _ring(axes: Axes, window: int, error: float) -> None:
    axes.plot(window, error, "o", markersize=13, fillstyle="none", markeredgewidth=2, color=color(1), zorder=4)


def tick_windows(axes: Axes, windows: Sequence[int]) -> None:
    """Set ticks at the window lengths, without those that would overlap the next one."""
    wide = windows[-1] > 10 * windows[0]
    if wide:
        axes.set_xscale("log")
    axes.margins(x=0.04)
    place = {window: math.log(window) if wide else window for window in windows}
    span = place[windows[-1]] - place[windows[0]]
    ticks = [windows[-1]]
    for window in reversed(windows[:-1]):
        if place[ticks[-1]] - place[window] >= _TICK_GAP * span:
            ticks.append(window)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
