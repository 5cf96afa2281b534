"""Pictures of the budget curve of an allocation, and of channel ranges before and after grouping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from lightning_quant.errors import ConfigurationError
from lightning_quant.igq_vit.allocation import BudgetPoint
from lightning_quant.report.plotting import GRAY, color, finish, log_scale, panels

_ALLOCATED, _UNIFORM = color(0), color(1)


_SHADES = tuple(map(color, (0, 4, 2, 3)))


_GIGA = 1e9


Range = tuple[float, float]


def draw_budget_curve(
    points: Sequence[BudgetPoint],
    path: Path,
    title: str = "",
    chosen: int | None = None,
    unit: str = "GBOPs",
) -> None:
    """Draw the perturbation over the cost, for allocated groups and for the same number of groups in every layer.

    Args:
        points: Points of :func:`~lightning_quant.igq_vit.allocation.budget_curve`.
        path: File of the picture, whose suffix sets the format (.png, .svg, .pdf).
        title: Title above the picture.
        chosen: Target average in use, whose point is marked; None marks none.
        unit: Unit of the costs. "GBOPs" divides them by 1e9; any other, such as "groups in all layers", only labels the
            axis.

    Raises:
        ConfigurationError: No point, or none for the chosen number of groups.
    """
    marked = _marked(points, chosen)
    scale = _GIGA if unit == "GBOPs" else 1.0
    figure, (axes,) = panels(1, height=4.4)
    for cost, omega, shade, style, label in (
        (
            [p.budget for p in points],
            [p.uniform_omega for p in points],
            _UNIFORM,
            "o--",
            "same number of groups in every layer",
        ),
        ([p.used for p in points], [p.omega for p in points], _ALLOCATED, "o-", "allocated within the same budget"),
    ):
        axes.plot(np.array(cost) / scale, omega, style, color=shade, label=label, markersize=4.5, linewidth=1.8)
    if all(min(p.omega, p.uniform_omega) > 0 for p in points):
        log_scale(axes)
    for point in points:
        _label(axes, (point.budget / scale, point.uniform_omega), str(point.groups), _UNIFORM)
    if marked is not None:
        _mark(axes, marked, scale)
    axes.set_xlabel("cost of the fully connected layers (GBOPs)" if unit == "GBOPs" else unit)
    axes.set_ylabel("perturbation: sum over layers of the\nmean KL divergence (nat)")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    _save(figure, path, title)


def draw_channel_ranges(
    low: ArrayLike,
    high: ArrayLike,
    group: ArrayLike,
    path: Path,
    title: str = "",
    bounds: Sequence[Range] | None = None,
) -> None:
    """Draw the range of each channel of one image at one layer, before and after grouping.

    The left panel shows the channels in their order, over the single range of a layer-wise quantizer. The right panel
    shows them sorted by group, over the range of each group's quantizer.

    Args:
        low: Smallest value of each channel, (channels,).
        high: Largest value of each channel, (channels,).
        group: Index of the group of each channel, (channels,).
        path: File of the picture, whose suffix sets the format (.png, .svg, .pdf).
        title: Title above the picture.
        bounds: Lower and upper bound of each group's quantizer; None takes the span of the group's channels.

    Raises:
        ConfigurationError: No channel, arrays of different lengths, or a group without bounds.
    """
    lows, highs, groups = _channels(low, high, group)
    figure, (before, after) = panels(2)
    _shade(before, 0, len(lows), (float(lows.min()), float(highs.max())), _SHADES[0])
    _bars(before, lows, highs)
    before.set_title("layer-wise: one range for all", fontsize=10, loc="left", color=GRAY)
    before.set_xlabel("channel")
    before.set_ylabel("value: min to max over the tokens")

    ranges = _group_ranges(lows, highs, groups, bounds)
    order = _order(groups, ranges, highs - lows)
    used = f"{len(ranges)} of {len(bounds)}" if bounds and len(bounds) > len(ranges) else f"{len(ranges)}"
    after.set_title(f"{used} groups, each with its own range", fontsize=10, loc="left", color=GRAY)
    start = 0
    for index, (name, span) in enumerate(sorted(ranges.items(), key=_width)):
        end = start + int((groups == name).sum())
        _shade(after, start, end, span, _SHADES[index % len(_SHADES)])
        start = end
    _bars(after, lows[order], highs[order])
    after.set_xlabel("channel, sorted by group")
    _save(figure, path, title)


def _marked(points: Sequence[BudgetPoint], chosen: int | None) -> BudgetPoint | None:
    if not points:
        raise ConfigurationError("No point to draw: pass the points that budget_curve(omega, cost) returns.")
    by_groups = {point.groups: point for point in points}
    if chosen is not None and chosen not in by_groups:
        raise ConfigurationError(f"No point for chosen={chosen} groups: expected {', '.join(map(str, by_groups))}.")
    return None if chosen is None else by_groups[chosen]


def _mark(axes: Axes, point: BudgetPoint, scale: float) -> None:
    at = (point.used / scale, point.omega)
    axes.plot(*at, "o", markersize=12, fillstyle="none", markeredgewidth=2, color=_ALLOCATED, label="chosen")
    axes.annotate(
        f"average {point.groups}: {point.omega:.3g}",
        at,
        xytext=(-8, -8),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color=_ALLOCATED,
    )


def _label(axes: Axes, at: Range, text: str, shade: str) -> None:
    axes.annotate(text, at, xytext=(4, 5), textcoords="offset points", fontsize=8, color=shade)


def _channels(low: ArrayLike, high: ArrayLike, group: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    lows, highs, groups = np.asarray(low, np.float64), np.asarray(high, np.float64), np.asarray(group)
    if not lows.ndim == highs.ndim == groups.ndim == 1 or not 0 < len(lows) == len(highs) == len(groups):
        raise ConfigurationError(
            f"low, high and group have shapes {lows.shape}, {highs.shape} and {groups.shape}: expected (channels,)"
            " with the same length, at least one."
        )
    return lows, highs, groups


def _group_ranges(
    low: NDArray[np.float64], high: NDArray[np.float64], group: NDArray[np.float64], bounds: Sequence[Range] | None
) -> dict[int, Range]:
    """Return the range of each group that has a channel."""
    names = [int(name) for name in np.unique(group)]
    if bounds is None:
        return {name: (float(low[group == name].min()), float(high[group == name].max())) for name in names}
    if names[-1] >= len(bounds) or names[0] < 0:
        raise ConfigurationError(f"A channel is in group {names[-1]}, but there are bounds for {len(bounds)} groups.")
    return {name: (float(bounds[name][0]), float(bounds[name][1])) for name in names}


def _width(item: tuple[int, Range]) -> float:
    return item[1][1] - item[1][0]


def _order(group: NDArray[np.float64], ranges: dict[int, Range], width: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sort channels by the width of their group's range, then by their own width."""
    rank = {name: place for place, (name, _) in enumerate(sorted(ranges.items(), key=_width))}
    return np.lexsort((width, np.array([rank[int(name)] for name in group])))


def _bars(axes: Axes, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
    """Draw one line per channel, as wide as the panel permits."""
    segments = [[(i + 0.5, low[i]), (i + 0.5, high[i])] for i in range(len(low))]
    axes.add_collection(LineCollection(segments, colors=GRAY, linewidths=min(4.0, max(0.35, 230 / len(low)))))
    axes.set_xlim(0, len(low))


def _shade(axes: Axes, start: int, end: int, span: Range, shade: str) -> None:
    axes.add_patch(Rectangle((start, span[0]), end - start, span[1] - span[0], color=shade, alpha=0.25, linewidth=0))
    # The bounds again, above the bars, which hide the shade if there are many channels.
    axes.hlines(span, start, end, colors=shade, linewidth=1.8, zorder=3)


def _save(figure: Figure, path: Path, title: str) -> None:
    for axes in figure.axes:
        axes.autoscale_view(scalex=False)
    finish(figure, path, title)
