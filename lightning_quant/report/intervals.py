"""Report section of INT4 training: intervals of the gradient quantizers over time, from logged metrics."""

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
    _Row("gamma", "gamma: end of the interval\n(relative to the largest gradient)", noisy=False),
    _Row("error_large", "mean error of large gradients\n(relative to the largest gradient)", noisy=True),
    _Row("clipped", "share of the gradients\nbeyond the interval", noisy=True, logarithmic=False),
)


@dataclass(frozen=True)
class Curve:
    """Curve of one measure of one layer over time.

    Attributes:
        steps: Optimizer steps, ascending.
        values: Value at each step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def end(self, count: int = _WINDOW) -> float:
        """Average the last ``count`` values.

        Example:
            >>> Curve((1, 2, 3), (9.0, 1.0, 3.0)).end(2)
            2.0
        """
        last = self.values[-count:]
        return sum(last) / len(last)

    def smooth(self, count: int = _WINDOW) -> Curve:
        """Return the running mean of each value and up to ``count - 1`` values before it.

        Example:
            >>> Curve((1, 2, 3), (1.0, 3.0, 5.0)).smooth(2).values
            (1.0, 2.0, 4.0)
        """
        windows = (self.values[max(0, i + 1 - count) : i + 1] for i in range(len(self.values)))
        return Curve(self.steps, tuple(sum(window) / len(window) for window in windows))


@dataclass(frozen=True)
class LayerMetrics:
    """Layer metrics that one run logged.

    Attributes:
        layers: Curves of each layer, keyed by measure (``gamma``, ``clipped``, ``target``, ``error``, ``error_large``,
            ``zero``). Layers are in the natural order of their names (``layer2`` before ``layer10``).
    """

    layers: Mapping[str, Mapping[str, Curve]]

    def mean_end(self, measure: str) -> float:
        """Average a measure at the end of the run over the layers.

        Example:
            >>> one, other = Curve((1,), (0.5,)), Curve((1,), (1.0,))
            >>> LayerMetrics({"a": {"gamma": one}, "b": {"gamma": other}}).mean_end("gamma")
            0.75
        """
        ends = [curves[measure].end() for curves in self.layers.values()]
        return sum(ends) / len(ends)


def parse_layer_metrics(rows: Iterable[Mapping[str, str]]) -> LayerMetrics:
    """Parse curves from rows with a ``step`` and columns ``gradient_quantization/<layer>/<measure>``.

    Empty cells are skipped.

    Raises:
        ConfigurationError: No row holds a measure of a layer.

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
            " write a log_every_n_steps of at most the number of steps of the run."
        )
    ordered = {
        layer: {measure: _curve(values) for measure, values in points[layer].items()}
        for layer in sorted(points, key=_natural)
    }
    return LayerMetrics(ordered)


def read_layer_metrics(path: str | Path) -> LayerMetrics:
    """Read the ``metrics.csv`` of Lightning's CSVLogger, see :func:`parse_layer_metrics`.

    Raises:
        ConfigurationError: The file does not exist, or holds no measure of a layer.
    """
    path = user_path(path)
    if not path.is_file():
        raise ConfigurationError(f"No file '{path}': pass the metrics.csv that Lightning's CSVLogger wrote.")
    with path.open(newline="", encoding="utf-8") as file:
        return parse_layer_metrics(csv.DictReader(file))


def draw_intervals(
    runs: Mapping[str, LayerMetrics], path: Path, layers: Sequence[str] | None = None, title: str = ""
) -> None:
    """Draw gamma, the error of large gradients and the clipped share over optimizer steps, with a column per layer.

    Each run is a line. Errors and shares are drawn as logged with thin lines, and as running means over five logs with
    thick ones. The axis of the errors is logarithmic.

    Args:
        runs: Layer metrics of each run, keyed by its name in the legend; the first run is drawn on top.
        path: File of the picture, whose suffix sets the format (.png, .svg, .pdf).
        layers: Names of the layers; None takes the first, the middle and the last.
        title: Title above the picture.

    Raises:
        ConfigurationError: No run, or a layer that some run lacks.
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


def _curve(values: Mapping[int, float]) -> Curve:
    steps = sorted(values)
    return Curve(tuple(steps), tuple(values[step] for step in steps))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _choose(runs: Mapping[str, LayerMetrics], layers: Sequence[str] | None) -> list[str]:
    if not runs:
        raise ConfigurationError("No run to draw: pass at least one, keyed by its name.")
    names = list(next(iter(runs.values())).layers)
    # A dict, since first, middle and last coincide in a network of one or two layers.
    chosen = list(dict.fromkeys((names[0], names[len(names) // 2], names[-1]) if layers is None else layers))
    for name, run in runs.items():
        missing = [layer for layer in chosen if layer not in run.layers]
        if missing:
            raise ConfigurationError(
                f"The run '{name}' has no layer '{missing[0]}': expected one of {', '.join(run.layers)}."
            )
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
    """Set the vertical scale of a row: errors are logarithmic, gamma and the clipped share are linear."""
    if not row.noisy:
        axes.set_ylim(0, 1.05)
        return
    if not row.logarithmic:
        # Shares are of the order of 1e-4 and may be 0.
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        return
    log_scale(axes)


def _style(axes: Axes) -> None:
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.01)


def _short(names: Sequence[str]) -> list[str]:
    """Strip the leading parts that all dotted names share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


@dataclass
class TrainingSection(Section):
    """Section of INT4 training: the intervals of the gradients over time."""

    callback: GradientQuantization

    @property
    def name(self) -> str:
        return "INT4 training"

    @property
    def detail(self) -> str:
        return f"Gradients quantized with {type(self.callback.interval).__name__}. "

    @property
    def execution(self) -> str:
        if self.callback.execution == "simulated":
            return super().execution
        return "Products of linear layers and plain convolutions run on int8 codes; others are simulated."

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
        ends = {name: {measure: curve.end() for measure, curve in curves.items()} for name, curves in layers.items()}
        return {"gradients_at_the_end": ends}

    def advice(self) -> Iterable[Finding]:
        metrics = self._metrics
        for name, curves in ({} if metrics is None else metrics.layers).items():
            if curves["zero"].end() > 0.95:
                yield Finding(
                    f"{name}: {curves['zero'].end():.0%} of its gradients are quantized to 0.",
                    "Its gradients have long tails: leave it in float, or increase gradient_bits for all layers.",
                    remedies.in_float(name, self.settings).line,
                )

    @property
    def settings(self) -> Settings:
        return {"exclude": self.callback.exclude, "quantizer_lr": self.callback.quantizer_lr}

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        return remedies.of_training(cause, layer, self.settings)
