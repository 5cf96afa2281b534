"""The intervals of the gradient quantizers over time, from what the callback logged."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import nn

from lightning_quant.analysis import Cause, LayerAnalysis
from lightning_quant.errors import ConfigurationError
from lightning_quant.gradient import GradientQuantization
from lightning_quant.gradient.history import PREFIX
from lightning_quant.report import remedies
from lightning_quant.report.plotting import GRAY, color, log_scale, save_figure, style_axes
from lightning_quant.report.remedies import Finding, Remedy, Settings
from lightning_quant.report.section import Section
from lightning_quant.utilities.paths import user_path

_WINDOW = 5


@dataclass(frozen=True)
class _Row:
    measure: str
    label: str
    noisy: bool
    logarithmic: bool = True


_ROWS = (
    _Row("gamma", "gamma: end of the interval\n(of the largest gradient)", noisy=False),
    _Row("error_large", "mean error of the large ones\n(of the largest gradient)", noisy=True),
    _Row("clipped", "share of the gradients\nbeyond the interval", noisy=True, logarithmic=False),
)


@dataclass(frozen=True)
class Curve:
    """One measure of one layer over time.

    Attributes:
        steps: optimizer steps, ascending.
        values: the measure at each.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def end(self, count: int = _WINDOW) -> float:
        """Mean of the last ``count`` values.

        Example:
            >>> Curve((1, 2, 3), (9.0, 1.0, 3.0)).end(2)
            2.0
        """
        last = self.values[-count:]
        return sum(last) / len(last)

    def smooth(self, count: int = _WINDOW) -> Curve:
        """The mean of each value and up to ``count - 1`` before it.

        Example:
            >>> Curve((1, 2, 3), (1.0, 3.0, 5.0)).smooth(2).values
            (1.0, 2.0, 4.0)
        """
        windows = (self.values[max(0, i + 1 - count) : i + 1] for i in range(len(self.values)))
        return Curve(self.steps, tuple(sum(window) / len(window) for window in windows))


@dataclass(frozen=True)
class LayerMetrics:
    """What one run logged of its layers.

    Attributes:
        layers: curves by measure (``gamma``, ``clipped``, ``target``, ``error``, ``error_large``, ``zero``) by the
            name of the layer, in the natural order of the names (``layer2`` before ``layer10``).
    """

    layers: Mapping[str, Mapping[str, Curve]]

    def mean_end(self, measure: str) -> float:
        """Mean over the layers of a measure at the end of the run.

        Example:
            >>> one, other = Curve((1,), (0.5,)), Curve((1,), (1.0,))
            >>> LayerMetrics({"a": {"gamma": one}, "b": {"gamma": other}}).mean_end("gamma")
            0.75
        """
        ends = [curves[measure].end() for curves in self.layers.values()]
        return sum(ends) / len(ends)


def parse_layer_metrics(rows: Iterable[Mapping[str, str]]) -> LayerMetrics:
    """Curves from rows with a ``step`` and columns ``gradient_quantization/<layer>/<measure>``.

    Empty cells are skipped.

    Raises:
        ConfigurationError: where no row holds a measure of a layer.

    Example:
        >>> metrics = parse_layer_metrics([{"step": "5", "gradient_quantization/conv/gamma": "0.5", "loss": ""}])
        >>> metrics.layers["conv"]["gamma"]
        Curve(steps=(5,), values=(0.5,))
    """
    points: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for key, cell in row.items():
            if cell and key.startswith(f"{PREFIX}/"):
                layer, measure = key.removeprefix(f"{PREFIX}/").rsplit("/", 1)
                points.setdefault(layer, {}).setdefault(measure, {})[int(row["step"])] = float(cell)
    if not points:
        raise ConfigurationError(
            f"No column {PREFIX}/<layer>/<measure> holds a number: train with GradientQuantization and a logger, and"
            " write a log_every_n_steps that is no longer than the run."
        )
    ordered = {
        layer: {measure: _curve(at) for measure, at in points[layer].items()} for layer in sorted(points, key=_natural)
    }
    return LayerMetrics(ordered)


def read_layer_metrics(path: str | Path) -> LayerMetrics:
    """:func:`parse_layer_metrics` of the ``metrics.csv`` of Lightning's CSVLogger.

    Raises:
        ConfigurationError: where there is no such file, or no measure in it.
    """
    path = user_path(path)
    if not path.is_file():
        raise ConfigurationError(f"No file '{path}': give the metrics.csv that Lightning's CSVLogger wrote.")
    with path.open(newline="", encoding="utf-8") as file:
        return parse_layer_metrics(csv.DictReader(file))


def draw_intervals(
    runs: Mapping[str, LayerMetrics], path: Path, layers: Sequence[str] | None = None, title: str = ""
) -> None:
    """Draw gamma, the error of the large gradients and the clipped share over optimizer steps, a column for each layer.

    Each run is a line. Errors and shares are drawn thin as they were logged, and thick as a running mean over five
    logs; errors on a logarithmic axis.

    Args:
        runs: by the name that the legend gives them; the first lies on top.
        path: of the picture, whose ending decides the format (.png, .svg, .pdf).
        layers: names; None takes the first, the middle and the last.
        title: above the picture.

    Raises:
        ConfigurationError: no run, or a layer that not every run has.
    """
    chosen = _choose(runs, layers)
    figure = Figure(figsize=(max(5.0, 0.9 + 3.05 * len(chosen)), 8.2), dpi=150, layout="constrained")
    grid = figure.subplots(len(_ROWS), len(chosen), sharex=True, sharey="row", squeeze=False)
    for axes_row, row in zip(grid, _ROWS, strict=True):
        for axes, layer in zip(axes_row, chosen, strict=True):
            for order, run in enumerate(runs.values()):
                _draw_curve(axes, run.layers[layer].get(row.measure), row.noisy, order)
            _style(axes)
        axes_row[0].set_ylabel(row.label)
        _scale(axes_row[0], row)
    for axes, name in zip(grid[0], _short(chosen), strict=True):
        axes.set_title(name, fontsize=10, loc="left", color=GRAY)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    handles = [Line2D([], [], color=color(order), linewidth=2) for order in range(len(runs))]
    legend = figure.legend(
        handles, list(runs), loc="outside upper left", ncols=4, frameon=False, fontsize=10, title=title or None
    )
    legend.set_alignment("left")
    save_figure(figure, path)


def _curve(at: Mapping[int, float]) -> Curve:
    steps = sorted(at)
    return Curve(tuple(steps), tuple(at[step] for step in steps))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _choose(runs: Mapping[str, LayerMetrics], layers: Sequence[str] | None) -> list[str]:
    if not runs:
        raise ConfigurationError("No run to draw: give at least one, by its name.")
    known = list(next(iter(runs.values())).layers)
    # A dict, since a network of one or two layers has the same first, middle and last one.
    chosen = list(dict.fromkeys((known[0], known[len(known) // 2], known[-1]) if layers is None else layers))
    for name, run in runs.items():
        missing = [layer for layer in chosen if layer not in run.layers]
        if missing:
            raise ConfigurationError(f"The run '{name}' has no layer '{missing[0]}'. It has {', '.join(run.layers)}.")
    return chosen


def _draw_curve(axes: Axes, curve: Curve | None, noisy: bool, order: int) -> None:
    if curve is None:
        return
    above = 3 - order / 100  # the first on top
    if noisy:
        axes.plot(curve.steps, curve.values, color=color(order), linewidth=0.7, alpha=0.35, zorder=above - 1)
        curve = curve.smooth()
    axes.plot(curve.steps, curve.values, color=color(order), linewidth=1.8, zorder=above)


def _scale(axes: Axes, row: _Row) -> None:
    """Of the whole row: errors differ by factors, gamma is a share."""
    if not row.noisy:
        axes.set_ylim(0, 1.05)
        return
    if not row.logarithmic:
        # Shares may be 0, and are of the order of 1e-4.
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        return
    log_scale(axes)


def _style(axes: Axes) -> None:
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.01)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the dotted beginning that all share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


@dataclass
class TrainingSection(Section):
    """INT4 training: the intervals of the gradients over time."""

    callback: GradientQuantization

    @property
    def name(self) -> str:
        return "INT4 training"

    @property
    def detail(self) -> str:
        return f"Gradients by {type(self.callback.interval).__name__}. "

    @property
    def execution(self) -> str:
        if self.callback.execution == "simulated":
            return super().execution
        return "Products of linear layers and plain convolutions run on int8 codes, others are simulated."

    @property
    def _metrics(self) -> LayerMetrics | None:
        rows = self.callback.history.rows
        texts = [{"step": str(step), **{key: str(value) for key, value in values.items()}} for step, values in rows]
        return parse_layer_metrics(texts) if texts else None

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        metrics = self._metrics
        if metrics is None:
            return {}
        draw_intervals({type(self.callback.interval).__name__: metrics}, folder / "intervals.png")
        return {"Intervals of the gradients over the training": folder / "intervals.png"}

    def figures(self) -> Mapping[str, Any]:
        metrics = self._metrics
        layers = {} if metrics is None else metrics.layers
        ends = {name: {what: curve.end() for what, curve in curves.items()} for name, curves in layers.items()}
        return {"gradients_at_the_end": ends}

    def advice(self) -> Iterable[Finding]:
        metrics = self._metrics
        for name, curves in ({} if metrics is None else metrics.layers).items():
            if curves["zero"].end() > 0.95:
                yield Finding(
                    f"{name}: {curves['zero'].end():.0%} of its gradients have the code 0.",
                    "Its gradients have long tails: leave it in float, or give all layers more gradient_bits.",
                    remedies.in_float(name, self.settings).line,
                )

    @property
    def settings(self) -> Settings:
        return {"exclude": self.callback.exclude, "quantizer_lr": self.callback.quantizer_lr}

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        return remedies.of_training(cause, layer, self.settings)
