"""Picture of the errors over the denoising steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.plotting import (
    GRAY,
    color,
    dashes,
    finish,
    label_ends,
    numbers,
    panels,
    scale_values,
    short,
    wrapped,
)


def draw_error_curves(
    accumulated: Mapping[str, Tensor],
    single_step: Mapping[str, Tensor] | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    path: Path | None = None,
    title: str = "Quantization error over the denoising steps",
) -> Figure:
    r"""Draw the RMSE to the float trajectory over the denoising steps, with one line per method and its last value.

    Several runs are drawn as their mean and a band from the lowest to the highest.

    Args:
        accumulated: Errors (N + 1,) or (runs, N + 1) of each method, from x_0 (noise, always 0) to x_N (the sample), if
            each model continues from its own states.
        single_step: Errors if each step starts from the float state, drawn in a second panel; (N,) leaves out the
            noise.
        timesteps: Timesteps of the scheduler (N,), written above the panels.
        path: File of the picture, whose suffix sets the format (.png, .svg, .pdf); None saves nothing.
        title: Title above the picture.

    Raises:
        ConfigurationError: No method, or lengths that do not match.

    Example:
        >>> import torch
        >>> curves = {"per_step": torch.linspace(0, 0.17, 21), "identity": torch.linspace(0, 0.11, 21)}
        >>> figure = draw_error_curves(curves)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['per_step\n0.170', 'identity\n0.110']
    """
    if not accumulated:
        raise ConfigurationError("No error to draw: pass the errors of at least one method, keyed by its name.")
    steps = numbers(next(iter(accumulated.values()))).shape[-1] - 1
    kinds = [("accumulated: from the model's own states", accumulated)]
    if single_step:
        kinds.append(("single step: each from the float state", single_step))
    labeled = [(label, {name: _curve(name, errors, steps) for name, errors in kind.items()}) for label, kind in kinds]
    calls = _timesteps(timesteps, steps)
    names = list(dict.fromkeys(name for _, curves in labeled for name in curves))
    figure, grid = panels(len(labeled))
    scale_values(grid[0], np.concatenate([curve.ravel() for _, curves in labeled for curve in curves.values()]))
    for axes, (label, curves) in zip(grid, labeled, strict=True):
        for name, curve in curves.items():
            _draw_curve(axes, curve, names.index(name))
        _title_steps(axes, label, steps, calls)
    for axes, (_, curves) in zip(grid, labeled, strict=True):
        label_ends(axes, [(steps, *_end(name, curve), color(names.index(name))) for name, curve in curves.items()])
    runs = max(len(curve) for _, curves in labeled for curve in curves.values())
    band = f"\n(mean and range of {runs} runs)" if runs > 1 else ""
    grid[0].set_ylabel(f"RMSE to the float state{band}")
    return finish(figure, path, title)


def _curve(name: str, values: Tensor, steps: int) -> NDArray[np.float64]:
    """Check the errors of a method and return them as (runs, N + 1), with NaN for the noise if it is left out."""
    curve = np.atleast_2d(numbers(values))
    if curve.ndim != 2 or steps < 1 or curve.shape[1] not in (steps, steps + 1) or not len(curve):
        raise ConfigurationError(
            f"The errors of '{name}' have shape {tuple(np.shape(numbers(values)))}: expected ({steps + 1},) or (runs,"
            f" {steps + 1}), one error per state from the noise to the sample."
        )
    missing = steps + 1 - curve.shape[1]
    return np.pad(curve, ((0, 0), (missing, 0)), constant_values=np.nan)


def _timesteps(timesteps: Sequence[int] | Tensor | None, steps: int) -> list[int] | None:
    if timesteps is None:
        return None
    calls = [int(timestep) for timestep in timesteps]
    if len(calls) != steps:
        raise ConfigurationError(f"{len(calls)} timesteps for errors of {steps} steps: expected one per step.")
    return calls


def _draw_curve(axes: Axes, curve: NDArray[np.float64], order: int) -> None:
    steps = np.arange(curve.shape[1])
    # The noise has error 0, which a logarithmic axis cannot show.
    drawn = np.where(curve > 0, curve, np.nan) if axes.get_yscale() == "log" else curve
    above = 3 - order / 100
    if len(curve) > 1:
        axes.fill_between(
            steps, drawn.min(0), drawn.max(0), color=color(order), alpha=0.2, linewidth=0, zorder=above - 1
        )
    axes.plot(steps, drawn.mean(0), color=color(order), linestyle=dashes(order), linewidth=1.8, zorder=above)


def _end(name: str, curve: NDArray[np.float64]) -> tuple[float, str]:
    """Return the last value of a curve and its label."""
    last = curve[:, -1]
    spread = f" ({short(last.min())} to {short(last.max())})" if len(last) > 1 else ""
    return float(last.mean()), f"{wrapped(name)}\n{short(last.mean())}{spread}"


def _title_steps(axes: Axes, label: str, steps: int, calls: Sequence[int] | None) -> None:
    axes.set_title(label, fontsize=10, loc="left", color=GRAY)
    axes.set_xlabel("denoising steps taken (0: noise)")
    axes.set_xlim(0, steps)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if calls is None:
        return
    ticks = [int(tick) for tick in MaxNLocator(5, integer=True).tick_values(0, steps) if 0 <= tick < steps]
    above = axes.secondary_xaxis("top")
    above.xaxis.set_major_locator(FixedLocator(ticks))
    above.xaxis.set_major_formatter(FuncFormatter(lambda place, _: str(calls[round(place)])))
    above.tick_params(labelsize=8, colors=GRAY, length=3)
    above.spines["top"].set_visible(False)
    above.set_xlabel("timestep of the scheduler at that state", fontsize=8, color=GRAY)
