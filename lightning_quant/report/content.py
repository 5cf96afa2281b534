"""Content of the report of a run, for the page and its JSON twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_quant.analysis import Analysis, Recorder
from lightning_quant.nn.modes import evaluating
from lightning_quant.report.environment import config_of, environment_of, peak_memory
from lightning_quant.report.html import Figures, RunReport
from lightning_quant.report.layer_charts import draw_noise, draw_sensitivity
from lightning_quant.report.remedies import Finding, effect, in_float
from lightning_quant.report.section import Section
from lightning_quant.utilities.text import byte_size, large_number, listed


@dataclass(frozen=True)
class Run:
    """Finished run and its measurements.

    Attributes:
        trainer: Trainer of the run.
        pl_module: Module of the run.
        section: Section of the method.
        recorder: Recorder with calls of the quantized network.
        root: Name of the quantized network in the module.
        analysis: Figures of the layers.
        stage: Name of the run on the page, such as "test".
        seconds: Duration of the run.
        float_metrics: Metrics of the float network, keyed by the names that the module logs.
        float_ckpt_path: Checkpoint of the float network, or None.
    """

    trainer: pl.Trainer
    pl_module: pl.LightningModule
    section: Section
    recorder: Recorder
    root: str
    analysis: Analysis
    stage: str
    seconds: float
    float_metrics: Mapping[str, float]
    float_ckpt_path: str | None

    @property
    def network(self) -> nn.Module:
        """Quantized network."""
        return self.pl_module.get_submodule(self.root)

    def report(self, drawn: Path) -> RunReport:
        """Assemble the content of the report.

        Args:
            drawn: Folder in which to draw the pictures.
        """
        section, analysis, name = self.section, self.analysis, type(self.pl_module).__name__
        bits = sorted({figures.bits for layer in analysis.layers for figures in layer.tensors.values()})
        return RunReport(
            title=f"{section.name}: {name}",
            lead=f"{section.detail}{len(analysis.layers)} layers and attentions of {name} in {listed(bits)} bits,"
            f" measured after the {self.stage}. {section.execution}",
            summary=self._summary(),
            analysis=analysis,
            pictures={title: path.read_bytes() for title, path in self._pictures(drawn).items()},
            environment=environment_of(self.trainer, self.network, self.stage),
            advice=[*section.advice(), *network_advice(analysis, section)],
            findings=section.findings(analysis),
            settings=section.settings,
            plan=section.plan,
            config=config_of(self.trainer, self.pl_module),
            figures=section.figures(),
        )

    def _pictures(self, drawn: Path) -> dict[str, Path]:
        layers, pictures = self.analysis.layers, dict[str, Path]()
        if any(layer.cost is not None for layer in layers):
            pictures["Cost of each layer"] = drawn / "sensitivity.png"
            draw_sensitivity(layers, self.analysis.error, drawn / "sensitivity.png")
        pictures["Signal-to-quantization-noise ratio of each tensor"] = drawn / "noise.png"
        draw_noise(layers, drawn / "noise.png")
        with torch.no_grad(), evaluating(self.network):
            forward = partial(self.recorder.calls[0].run, self.network)
            return pictures | self.section.draw(drawn, self.pl_module, forward)

    def _summary(self) -> list[Figures]:
        rows = []
        for name, value in sorted(self.trainer.callback_metrics.items()):
            in_float = self.float_metrics.get(name)
            rows.append(
                Figures(name, "" if in_float is None else f"{in_float:.4g}", f"{float(value):.4g}", "as logged")
            )
        rows += _outputs(self.analysis, self.float_ckpt_path) + _costs(self.analysis)
        memory = f"peak memory {byte_size(peak_memory())}"
        return [*rows, Figures(f"the {self.stage}", "", f"{self.seconds:.0f} s", memory)]


def _outputs(analysis: Analysis, float_ckpt_path: str | None) -> list[Figures]:
    rows = []
    if analysis.error is not None:
        checkpoint = "" if float_ckpt_path is None else f"; float is {float_ckpt_path}"
        note = f"norm of the difference, relative to the float outputs, over the recorded calls{checkpoint}"
        rows.append(Figures("error of the outputs", "0", f"{analysis.error:.2%}", note))
    if analysis.agreement is not None:
        rows.append(Figures("same class as float", "all", f"{analysis.agreement:.1%}", "over the recorded calls"))
    return rows


def _costs(analysis: Analysis) -> list[Figures]:
    share = analysis.quantized_bytes / analysis.float_bytes
    size = f"{byte_size(analysis.quantized_bytes)} ({share:.1%})"
    rows = [Figures("size of the parameters", byte_size(analysis.float_bytes), size, "codes packed")]
    if analysis.float_bops and analysis.quantized_bops:
        share = analysis.quantized_bops / analysis.float_bops
        bops = f"{large_number(analysis.quantized_bops)} ({share:.2%})"
        note = "including groups" if any(layer.groups for layer in analysis.layers) else ""
        rows.append(Figures("bit operations per image", large_number(analysis.float_bops), bops, note))
    slower = analysis.quantized_seconds / analysis.float_seconds if analysis.float_seconds else 0.0
    note = f"on this machine, {slower:.1f} times the float time: simulated, so it says nothing about low-bit hardware"
    times = [f"{1e3 * value:.1f} ms" for value in (analysis.float_seconds, analysis.quantized_seconds)]
    return [*rows, Figures("time of the recorded calls", times[0], times[1], note)]


def with_full_names(root: str, analysis: Analysis) -> Analysis:
    """Rename the layers of an analysis as they are named in the module.

    Args:
        root: Name of the analyzed network in the module.
        analysis: Analysis of the network.
    """
    if not root:
        return analysis

    def full(name: str) -> str:
        return f"{root}.{name}" if name else root

    layers = [replace(layer, name=full(layer.name)) for layer in analysis.layers]
    return replace(analysis, layers=layers, left_out=[full(name) for name in analysis.left_out])


def logged_metrics(analysis: Analysis) -> dict[str, float]:
    """Return the figures for the Trainer's loggers, keyed by name."""
    metrics = {"quantization/bytes": float(analysis.quantized_bytes)}
    for name in ("error", "agreement", "quantized_bops"):
        value = getattr(analysis, name)
        if value is not None:
            metrics[f"quantization/{name}"] = float(value)
    for layer in analysis.layers:
        if layer.only_quantized is not None:
            metrics[f"quantization/{layer.name}/only_quantized"] = layer.only_quantized
        if layer.moves is not None:
            metrics[f"quantization/{layer.name}/moves"] = layer.moves
        metrics |= {f"quantization/{layer.name}/{slot}_sqnr": figures.sqnr for slot, figures in layer.tensors.items()}
    return metrics


def network_advice(analysis: Analysis, section: Section) -> Iterator[Finding]:
    """Advise on the network as a whole, from the figures of its layers."""
    measured = [layer for layer in analysis.layers if layer.only_quantized]
    total = sum((layer.only_quantized or 0.0) ** 2 for layer in measured)
    if not measured or not total:
        return
    worst = max(measured, key=lambda layer: layer.only_quantized or 0.0)
    share = (worst.only_quantized or 0.0) ** 2 / total
    if len(measured) > 2 and share > 0.5:
        yield Finding(
            f"{worst.name} causes {share:.0%} of the sum of the layers' individual squared errors.",
            f"The other layers cost little: leave this one in float{effect(worst, analysis)}.",
            in_float(worst.name, section.settings).line,
        )
