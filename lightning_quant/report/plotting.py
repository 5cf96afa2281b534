"""Common style of all pictures: colors, panels, axes, labels and files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from lightning_quant.utilities.paths import user_path

Values = float | Tensor | Sequence[float]
"""One number, or one per seed or position."""


# Okabe and Ito's colors, which color-blind readers tell apart. Markers and dashes differ too, for lines that overlap.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


_MARKERS = "os^Dv<>"


_DASHES = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (2.5, 1)))


GRAY = "#555555"


def numbers(values: Values) -> NDArray[np.float64]:
    """Convert numbers, or a tensor on any device, to a NumPy array.

    Example:
        >>> numbers(torch.ones(2))
        array([1., 1.])
    """
    array: NDArray[np.float64] = torch.as_tensor(values, dtype=torch.float64).detach().cpu().numpy()
    return array


def short(value: float) -> str:
    """Format a number with three significant digits.

    Example:
        >>> short(0.11), short(12.0), short(480.0), short(12345.6)
        ('0.110', '12.0', '480', '12346')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def wrapped(name: str) -> str:
    r"""Break a name into lines that fit beside a panel.

    Example:
        >>> wrapped("AccuQuant, identity, windows of 4")
        'AccuQuant, identity,\nwindows of 4'
    """
    return textwrap.fill(name, 22)


def color(order: int) -> str:
    """Return the color of a line by its index in the drawing order."""
    return _COLORS[order % len(_COLORS)]


def dashes(order: int) -> str | tuple[float, tuple[float, ...]]:
    """Return the dashes of a line by its index in the drawing order, solid first."""
    return _DASHES[order % len(_DASHES)]


def panels(count: int, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """Create a figure of panels side by side that share their vertical axis."""
    figure = Figure(figsize=(6.8 if count == 1 else 5.6 * count, height), dpi=150, layout="constrained")
    grid = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in grid:
        style_axes(axes)
    return figure, list(grid)


def style_axes(axes: Axes) -> None:
    """Reduce axes to two spines and thin horizontal grid lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def log_scale(axes: Axes, subs: Sequence[int] = (1, 2, 5)) -> None:
    """Make the vertical axis logarithmic, with plain tick labels at these multiples of each power of 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def scale_values(axes: Axes, values: NDArray[np.float64]) -> None:
    """Make the vertical axis logarithmic if positive values span over a decade, otherwise linear from zero."""
    positive = values[np.isfinite(values) & (values > 0)]
    span = float(positive.max() / positive.min()) if positive.size else 1.0
    if span > 10:
        log_scale(axes, (1, 2, 5) if span < 1e3 else (1,))
    else:
        axes.set_ylim(0, 1.08 * float(positive.max()) if positive.size else 1.0)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Label lines on the right without overlaps, and connect each text to the end of its line.

    Args:
        axes: Panel with its final limits.
        ends: Last point (x, y), text and color of each line.
    """
    from sklearn.isotonic import isotonic_regression

    low, high = axes.get_ylim()
    at = [y if math.isfinite(y) and low < y < high else (low if y <= low else high) for _, y, _, _ in ends]
    heights = [float((axes.transScale + axes.transLimits).transform((ends[0][0], y))[1]) for y in at]
    order = sorted(range(len(ends)), key=lambda i: (heights[i], -i))
    lines = max(text.count("\n") + 1 for _, _, text, _ in ends)
    # About 0.72 of a figure are its axes. Isotonic regression finds the nearest positions that keep the gap.
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
    """Set the title, and save the figure if there is a path."""
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    if path is not None:
        save_figure(figure, path)
    return figure


def line_style(order: int) -> dict[str, Any]:
    """Return color, marker and dashes of a line by its index in the drawing order; the first is on top."""
    marker = _MARKERS[order % len(_MARKERS)]
    return {"color": color(order), "linestyle": dashes(order), "marker": marker, "zorder": 3 - order / 100}


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure to a file, whose suffix sets the format, and create the folder if it is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(Figure(), folder + "/pictures/empty.svg")
        ...     [path.name for path in user_path(folder).rglob("*.svg")]
        ['empty.svg']
    """
    target = user_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
