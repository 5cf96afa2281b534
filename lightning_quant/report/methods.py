"""What each method adds to the report of a run: its pictures, its figures, and what they suggest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from torch import nn

from lightning_quant.accuquant.calibration import STAGES, staged
from lightning_quant.analysis import Analysis, Cause, LayerAnalysis, find_causes
from lightning_quant.calibration.record import Record, is_finished, numbered, plan_of, settings_of
from lightning_quant.gradient import GradientQuantization
from lightning_quant.igq_vit.records import OMEGA, groups_of, tables_of
from lightning_quant.report import remedies
from lightning_quant.report.calibration import draw_groups
from lightning_quant.report.intervals import LayerMetrics, draw_intervals, parse_layer_metrics
from lightning_quant.report.remedies import Finding, Remedy, Settings
from lightning_quant.report.trajectories import GenerationReport, draw_generation

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
    def names_are_of_the_denoiser(self) -> bool:
        """Whether layers are named as the denoiser has them, and not as the module does."""
        return False

    @property
    def plan(self) -> str:
        """As text; empty where there is none beyond the layers."""
        return ""

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        """Pictures by their titles; ``forward`` calls what is quantized of the module ``network`` with images."""
        return {}

    def figures(self) -> Mapping[str, Any]:
        """Values of JSON."""
        return {}

    def advice(self) -> Iterable[Finding]:
        """What the run as a whole suggests."""
        return ()

    @property
    def settings(self) -> Settings:
        """Arguments of the method by name, as far as they are known."""
        return {}

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        """What to write against a cause."""
        return remedies.of_any(cause, layer, self.settings)

    def findings(self, analysis: Analysis) -> dict[str, list[Finding]]:
        """Causes and remedies of each layer, by its name."""
        return {
            layer.name: [self._finding(cause, layer, analysis) for cause in find_causes(layer)]
            for layer in analysis.layers
        }

    def _finding(self, cause: Cause, layer: LayerAnalysis, analysis: Analysis) -> Finding:
        words, line = self.remedy(cause, layer)
        measured = remedies.effect(layer, analysis) if line.startswith("exclude=") else ""
        return Finding(str(cause), f"{words[0].upper()}{words[1:]}{measured}.", line)


def method_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Method:
    """The method of a run, from its callbacks and its module; a plain one where neither tells."""
    holders: list[Any] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]  # Trainer makes it elsewhere
    generated: Any = next((found for each in holders if (found := getattr(each, "generation_report", None))), {})
    for holder in holders:
        match getattr(holder, "callback_name", ""):
            case "IGQViT":
                return _Groups(holder.record)
            case "AccuQuant":
                return _Windows(holder.record, generated)
        if isinstance(holder, GradientQuantization):
            return _Gradients(holder)
    return _Windows({}, generated) if generated else Method()


@dataclass
class _Gradients(Method):
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


@dataclass
class _Groups(Method):
    record: Record

    @property
    def name(self) -> str:
        return "IGQ-ViT"

    @property
    def detail(self) -> str:
        scheme = settings_of(self.record).get("scheme")
        return f"Scheme '{scheme}'{', groups allocated' if groups_of(self.record) else ''}. " if scheme else ""

    @property
    def plan(self) -> str:
        return plan_of(self.record)

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        return _titled(draw_groups(self.record, network, forward, folder)) if is_finished(self.record) else {}

    def figures(self) -> Mapping[str, Any]:
        return {"groups": groups_of(self.record), "perturbations": tables_of(self.record, OMEGA)}

    @property
    def settings(self) -> Settings:
        return settings_of(self.record)

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        return remedies.of_groups(cause, layer, self.settings)


@dataclass
class _Windows(Method):
    record: Record
    generated: GenerationReport

    @property
    def name(self) -> str:
        return "AccuQuant"

    @property
    def names_are_of_the_denoiser(self) -> bool:
        return True

    @property
    def plan(self) -> str:
        return plan_of(self.record)

    @property
    def _report(self) -> GenerationReport:
        """What a test has found, before what the calibration has."""
        curves = {"accumulated": staged(self.record, "error/"), "single_step": staged(self.record, "single_step/")}
        found: dict[str, Any] = {
            kind: {STAGES[stage]: values for stage, values in each.items()} for kind, each in curves.items() if each
        }
        # Those of another run's curves could be others.
        if "timesteps" in self.record and "accumulated" not in self.generated:
            found["timesteps"] = self.record["timesteps"].tolist()
        if sweep := numbered(self.record, "sweep/"):
            found["sweep"] = {length: float(error) for length, error in sweep.items()}
            found["chosen"] = min(found["sweep"], key=found["sweep"].__getitem__)
        return cast(GenerationReport, {**found, **self.generated})

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        return _titled(draw_generation(self._report, folder))

    def figures(self) -> Mapping[str, Any]:
        report = self._report
        found: dict[str, Any] = {
            kind: {name: values.tolist() for name, values in report[kind].items()}  # type: ignore[literal-required]
            for kind in ("accumulated", "single_step")
            if kind in report
        }
        if "window" in self.record:
            found["window"] = int(self.record["window"])
            found["held_out_errors"] = {k: values.tolist() for k, values in staged(self.record, "error/").items()}
        return found

    def advice(self) -> Iterable[Finding]:
        accumulated, single = self._report.get("accumulated"), self._report.get("single_step")
        if not accumulated or not single:
            return
        # The last stage of which both are known: of a calibration that is not finished, the ranges.
        stage = [name for name in accumulated if name in single][-1:]
        if not stage:
            return
        end, step = float(accumulated[stage[0]][-1]), float(single[stage[0]].mean())
        if step > 0 and end > _PILES_UP * step:
            settings, tries = settings_of(self.record), ["more updates"]
            if not settings.get("reconstruction"):
                tries.insert(0, "reconstruction=100 before the windows")
            longest = "window" in self.record and int(self.record["window"]) >= len(self.record["timesteps"])
            if settings.get("window") != "sweep" and not longest:
                tries.insert(0, "a longer window (window='sweep' finds one)")
            yield Finding(
                f"The error at the end is {end / step:.0f} times that of a single step: it piles up.",
                f"Try {', or '.join(tries)}.",
            )

    @property
    def settings(self) -> Settings:
        return settings_of(self.record)

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        return remedies.of_windows(cause, layer, self.settings)


def _titled(written: Sequence[Path]) -> dict[str, Path]:
    return {_PICTURES[path.name]: path for path in written}
