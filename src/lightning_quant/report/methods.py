"""What each method adds to the report of a run: its pictures, its figures, and what they suggest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from lightning_quant.accuquant.session import Calibration as WindowCalibration
from lightning_quant.analysis import Finding
from lightning_quant.gradient import GradientQuantization
from lightning_quant.igq_vit.session import Calibration as GroupCalibration
from lightning_quant.report.calibration import draw_calibration
from lightning_quant.report.intervals import LayerMetrics, draw_intervals, parse_layer_metrics
from lightning_quant.report.trajectories import GenerationReport, draw_error_curves, draw_generation

# An error that piles up to more than this many times that of single steps asks for longer windows.
_PILES_UP = 3.0
_PICTURES = {
    "budget.png": "Perturbation over bit operations, same groups everywhere and allocated",
    "channel_ranges.png": "Channel ranges of one layer, before grouping and after",
    "images.png": "Images from the same seeds",
    "error_curves.png": "Error over the denoising steps",
    "window_sweep.png": "End error over the length of windows",
}


class Method:
    """One of the methods in a run; by itself that of a network of which nothing more is known."""

    @property
    def name(self) -> str:
        """What the page calls it."""
        return "A quantized network"

    @property
    def detail(self) -> str:
        """What the page says first; empty, or a sentence and a space."""
        return ""

    @property
    def execution(self) -> str:
        """How products run, in a sentence."""
        return "Products are simulated in floating point."

    @property
    def about_float(self) -> str:
        """What the float network is that the quantized one is compared to; empty where that goes without saying."""
        return ""

    @property
    def names_are_of_the_denoiser(self) -> bool:
        """Whether layers are named as the denoiser has them, and not as the module does."""
        return False

    @property
    def plan(self) -> str:
        """As text; empty where there is none beyond the layers."""
        return ""

    def draw(self, folder: Path) -> dict[str, Path]:
        """Pictures by their titles."""
        return {}

    def figures(self) -> Mapping[str, Any]:
        """Values of JSON."""
        return {}

    def advice(self) -> Iterable[Finding]:
        """What the run as a whole suggests."""
        return ()


def method_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Method:
    """The method of a run, from its callbacks and its module; a plain one where neither tells."""
    holders: list[Any] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]  # Trainer makes it elsewhere
    for holder in holders:
        calibration = getattr(holder, "calibration", None)
        if isinstance(calibration, GroupCalibration) and calibration.finished:
            return _Groups(calibration)
        if isinstance(calibration, WindowCalibration) or getattr(holder, "generation_report", None):
            found = calibration if isinstance(calibration, WindowCalibration) else None
            return _Windows(found, cast(GenerationReport, getattr(pl_module, "generation_report", None) or {}))
        if isinstance(holder, GradientQuantization):
            return _Gradients(holder)
    for holder in holders:
        calibrating = type(holder).__name__ if getattr(holder, "calibrates", False) else ""
        if kind := getattr(holder, "callback_name", calibrating):
            return _Loaded(kind)
    return Method()


@dataclass
class _Loaded(Method):
    """Of a checkpoint, whose calibration another run has seen."""

    kind: str

    @property
    def name(self) -> str:
        return {"IGQViT": "IGQ-ViT"}.get(self.kind, self.kind)

    @property
    def detail(self) -> str:
        return "Calibrated in an earlier run. "

    @property
    def names_are_of_the_denoiser(self) -> bool:
        return self.kind == "AccuQuant"


@dataclass
class _Gradients(Method):
    callback: GradientQuantization

    @property
    def name(self) -> str:
        return "INT4 training"

    @property
    def about_float(self) -> str:
        return "; float is these weights without the quantizers that they were trained with"

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
        rows = [{"step": str(step), **{k: str(v) for k, v in values.items()}} for step, values in self.callback.history]
        return parse_layer_metrics(rows) if rows else None

    def draw(self, folder: Path) -> dict[str, Path]:
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
                    "Its gradients have long tails: more gradient_bits, or exclude the layer.",
                )


@dataclass
class _Groups(Method):
    calibration: GroupCalibration

    @property
    def name(self) -> str:
        return "IGQ-ViT"

    @property
    def detail(self) -> str:
        settings = self.calibration.source.plan.settings
        return f"Scheme '{settings.scheme}'{', groups allocated' if self.calibration.groups else ''}. "

    @property
    def plan(self) -> str:
        return str(self.calibration.source.plan)

    def draw(self, folder: Path) -> dict[str, Path]:
        return _titled(draw_calibration(self.calibration, folder))

    def figures(self) -> Mapping[str, Any]:
        groups = {f"{name}.{slot}": count for (name, slot), count in self.calibration.groups.items()}
        perturbations = {f"{name}.{slot}": by for (name, slot), by in self.calibration.omega.items()}
        return {"groups": groups, "perturbations": perturbations}


@dataclass
class _Windows(Method):
    calibration: WindowCalibration | None
    report: GenerationReport

    @property
    def name(self) -> str:
        return "AccuQuant"

    @property
    def names_are_of_the_denoiser(self) -> bool:
        return True

    @property
    def plan(self) -> str:
        return "" if self.calibration is None else str(self.calibration.source.plan)

    def draw(self, folder: Path) -> dict[str, Path]:
        written = draw_generation(self.report, folder)
        if self.calibration is not None and "accumulated" not in self.report:
            written.append(folder / "error_curves.png")
            draw_error_curves(self.calibration.errors, path=written[-1])
        return _titled(written)

    def figures(self) -> Mapping[str, Any]:
        curves = {key: self.report[key] for key in ("accumulated", "single_step") if key in self.report}  # type: ignore[literal-required]
        found: dict[str, Any] = {
            key: {name: values.tolist() for name, values in each.items()} for key, each in curves.items()
        }
        if self.calibration is not None:
            found["held_out_errors"] = {name: values.tolist() for name, values in self.calibration.errors.items()}
            found["window"] = self.calibration.window
        return found

    def advice(self) -> Iterable[Finding]:
        accumulated, single = self.report.get("accumulated"), self.report.get("single_step")
        if not accumulated or not single:
            return
        end, step = float(next(iter(accumulated.values()))[-1]), float(next(iter(single.values())).mean())
        if step > 0 and end > _PILES_UP * step:
            yield Finding(
                f"The error at the end is {end / step:.0f} times that of a single step: it piles up.",
                "Try a longer window (window='sweep' finds one), reconstruction=100 before it, or more updates.",
            )


def _titled(written: Sequence[Path]) -> dict[str, Path]:
    return {_PICTURES[path.name]: path for path in written}
