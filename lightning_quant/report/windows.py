"""What the length of a window changes: the end error, the peak memory, and the direction of the gradients."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.saving import save_figure

Values = float | Tensor | Sequence[float]
"""One number, or one for each seed or position."""

# Okabe and Ito's colors, as in the other pictures. Shapes and dashes differ too, for lines that lie on each other.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<>"
_DASHES = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (2.5, 1)))
GREY = "#555555"
_MEGA = 1e6
# Of the axis, that two ticks are apart at least.
_TICK_GAP = 0.05


def draw_window_sweep(
    errors: Mapping[int, Values],
    path: Path | None = None,
    title: str = "End-of-trajectory error over the window length",
    chosen: int | None = None,
    calls: int | None = None,
    before: float | None = None,
) -> Figure:
    """Draw the error at the end of the trajectory over the window length: a point a seed, a line for their mean.

    Args:
        errors: RMSE to the float sample by window length M, one for each seed.
        path: of the picture, whose ending decides the format (.png, .svg, .pdf); None saves nothing.
        title: above the picture.
        chosen: the length that is marked; None marks the one with the lowest mean.
        calls: network calls of each calibration, all equal; None writes only that they are.
        before: error before the calibration, as a level to compare with.

    Raises:
        ConfigurationError: no window, a window without an error, or a chosen one that was not tried.

    Example:
        >>> figure = draw_window_sweep({1: 0.170, 4: [0.108, 0.112], 10: 0.140}, calls=4800)
        >>> figure.axes[0].get_title(loc="left")
        'lowest at M = 4: 0.110, each with 4,800 network calls'
    """
    seeds = _by_window(errors, "window sweep")
    means = {window: float(values.mean()) for window, values in seeds.items()}
    marked = _marked(means, chosen)
    figure, (axes,) = panels(1)
    for window, values in seeds.items():
        if len(values) > 1:
            axes.plot([window] * len(values), values, "o", color=color(0), markersize=4, alpha=0.45, linewidth=0)
    axes.plot(list(means), list(means.values()), "-o", color=color(0), linewidth=1.8, markersize=5)
    _ring(axes, marked, means[marked])
    every = np.concatenate([*seeds.values(), [] if before is None else [before]])
    scale_values(axes, every)
    _tick_windows(axes, list(means))
    if before is not None:
        axes.axhline(before, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        label_ends(axes, [(axes.get_xlim()[1], before, f"before\n{short(before)}", GREY)])
    word = "lowest at" if chosen is None else "chosen:"
    cost = "with equal network calls" if calls is None else f"each with {calls:,} network calls"
    axes.set_title(f"{word} M = {marked}: {short(means[marked])}, {cost}", fontsize=10, loc="left", color=GREY)
    axes.set_xlabel("window length M (denoising steps)")
    runs = max(len(values) for values in seeds.values())
    axes.set_ylabel("RMSE to the float sample" + (f"\n(points: {runs} seeds, line: mean)" if runs > 1 else ""))
    return finish(figure, path, title)


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
        means = {window: float(values.mean()) / _MEGA for window, values in _by_window(peak, name).items()}
        windows.update(means)
        _line(axes, means, order)
        first, *_, last = [*means.values()] * 2
        growth = last / first if first else math.nan
        ends.append((max(means), last, f"{wrapped(name)}\n{short(last)} MB (x{short(growth)})", color(order)))
    scale_values(axes, _heights(axes))
    _tick_windows(axes, sorted(windows))
    label_ends(axes, ends)
    axes.set_title("in brackets: longest window over shortest", fontsize=10, loc="left", color=GREY)
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
    found = {name: _by_window(each, name) for name, each in _named(cosines, "adjoint").items()}
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
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.set_xticks(range(len(windows)), [str(window) for window in windows])
    axes.tick_params(axis="x", length=0)
    label_ends(axes, ends)
    several = any(len(values) > 1 for each in found.values() for values in each.values())
    within = "\nwithin each: positions from noise (left) to image (right)" if several else ""
    axes.set_xlabel(f"window length M (denoising steps){within}")
    axes.set_ylabel("cosine (1: same direction)")
    return finish(figure, path, title)


def numbers(values: Values) -> NDArray[np.float64]:
    """Numbers, or a tensor on any device, as an array.

    Example:
        >>> numbers(torch.ones(2))
        array([1., 1.])
    """
    array: NDArray[np.float64] = torch.as_tensor(values, dtype=torch.float64).detach().cpu().numpy()
    return array


def short(value: float) -> str:
    """Three digits.

    Example:
        >>> short(0.11), short(12.0), short(480.0), short(12345.6)
        ('0.110', '12.0', '480', '12346')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def wrapped(name: str) -> str:
    r"""In lines short enough to stand beside a panel.

    Example:
        >>> wrapped("AccuQuant, identity, windows of 4")
        'AccuQuant, identity,\nwindows of 4'
    """
    return textwrap.fill(name, 22)


def color(order: int) -> str:
    """Of the line with this place in the order of drawing."""
    return _COLORS[order % len(_COLORS)]


def dashes(order: int) -> str | tuple[float, tuple[float, ...]]:
    """Of the line with this place: solid first."""
    return _DASHES[order % len(_DASHES)]


def panels(count: int, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side that share their vertical axis."""
    figure = Figure(figsize=(6.8 if count == 1 else 5.6 * count, height), dpi=150, layout="constrained")
    grid = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
    return figure, list(grid)


def scale_values(axes: Axes, values: NDArray[np.float64]) -> None:
    """A logarithmic vertical axis where positive values span more than a decade, else a linear one from zero."""
    seen = values[np.isfinite(values) & (values > 0)]
    span = float(seen.max() / seen.min()) if seen.size else 1.0
    if span > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1e3 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.08 * float(seen.max()) if seen.size else 1.0)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write at the right what each line is, apart from each other, with a thin line to where it ends.

    Args:
        axes: whose limits are final.
        ends: the last point (x, y), text and color of each line.
    """
    from sklearn.isotonic import isotonic_regression

    low, high = axes.get_ylim()
    at = [y if math.isfinite(y) and low < y < high else (low if y <= low else high) for _, y, _, _ in ends]
    heights = [float((axes.transScale + axes.transLimits).transform((ends[0][0], y))[1]) for y in at]
    order = sorted(range(len(ends)), key=lambda i: (heights[i], -i))
    lines = max(text.count("\n") + 1 for _, _, text, _ in ends)
    # About 0.72 of a figure is its axes. The nearest places that keep the gap are an isotonic regression.
    gap = lines * 11.5 / (0.72 * 72 * axes.figure.bbox.height / axes.figure.dpi)
    steps = gap * np.arange(len(ends))
    places = isotonic_regression(
        np.array([heights[i] for i in order]) - steps, y_min=0.0, y_max=max(0.0, 1 - 0.4 * gap - float(steps[-1]))
    )
    spots = dict(zip(order, places + steps, strict=True))
    for i, (x, _, text, shade) in enumerate(ends):
        axes.annotate(
            text,
            (x, at[i]),
            xytext=(1.035, spots[i]),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=shade,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": shade,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def finish(figure: Figure, path: Path | None, title: str) -> Figure:
    """Write the title, and the picture where there is a path."""
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    if path is not None:
        save_figure(figure, path)
    return figure


def _named(given: Mapping[str, Mapping[int, Values]], what: str) -> Mapping[str, Mapping[int, Values]]:
    if not given:
        raise ConfigurationError(f"No {what} to draw: give at least one, by its name.")
    return given


def _by_window(given: Mapping[int, Values], name: str) -> dict[int, NDArray[np.float64]]:
    """The numbers of each window, the shortest first."""
    found = {window: numbers(given[window]).reshape(-1) for window in sorted(given)}
    empty = [window for window, values in found.items() if not len(values)]
    if not found or empty:
        raise ConfigurationError(
            f"{name}: no number {f'for the window {empty[0]}' if empty else 'at all'}: expected a number, or"
            " several, by window length."
        )
    return found


def _marked(means: Mapping[int, float], chosen: int | None) -> int:
    if chosen is None:
        return min(means, key=lambda window: means[window])
    if chosen not in means:
        raise ConfigurationError(
            f"chosen={chosen} is not in the sweep: it has the windows {', '.join(map(str, means))}."
        )
    return chosen


def _ring(axes: Axes, window: int, error: float) -> None:
    axes.plot(window, error, "o", markersize=13, fillstyle="none", markeredgewidth=2, color=color(1), zorder=4)


def _line(axes: Axes, means: Mapping[int, float], order: int) -> None:
    axes.plot(list(means), list(means.values()), linewidth=1.8, markersize=5, **_style(order))


def _style(order: int) -> dict[str, Any]:
    """Colour, shape and dashes of the line with this place; the first lies on top."""
    marker = _MARKERS[order % len(_MARKERS)]
    return {"color": color(order), "linestyle": dashes(order), "marker": marker, "zorder": 3 - order / 100}


def _heights(axes: Axes) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])


def _tick_windows(axes: Axes, windows: Sequence[int]) -> None:
    """Ticks at the windows themselves, less those that would touch the next one."""
    wide = windows[-1] > 10 * windows[0]
    if wide:
        axes.set_xscale("log")
    axes.margins(x=0.04)
    place = {window: math.log(window) if wide else window for window in windows}
    span = place[windows[-1]] - place[windows[0]]
    kept = [windows[-1]]
    for window in reversed(windows[:-1]):
        if place[kept[-1]] - place[window] >= _TICK_GAP * span:
            kept.append(window)
    axes.xaxis.set_major_locator(FixedLocator(sorted(kept)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _places(slot: int, count: int) -> NDArray[np.float64]:
    """From left to right in the slot; one alone in its middle."""
    return slot + (np.linspace(-0.36, 0.36, count) if count > 1 else np.zeros(1))


def _positions(axes: Axes, slots: Mapping[int, NDArray[np.float64]], order: int) -> None:
    """A line in each slot; one through all where each has a single number."""
    if all(len(values) == 1 for values in slots.values()):
        axes.plot(list(slots), np.concatenate(list(slots.values())), linewidth=1.8, markersize=5, **_style(order))
        return
    for slot, values in slots.items():
        axes.plot(_places(slot, len(values)), values, linewidth=1.2, markersize=3.5, **_style(order))
