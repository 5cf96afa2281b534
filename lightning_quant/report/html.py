"""Page of a run: a self-contained HTML file, and the same figures as JSON."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_quant.analysis import Analysis, LayerAnalysis
from lightning_quant.report.remedies import Finding, joint_line
from lightning_quant.utilities.files import whole_file
from lightning_quant.utilities.paths import trainer_path, user_path

PAGE = Path(__file__).parent / "page"
NAME = "quantization_report"
FORMAT = 1
# Number of layers that are described in words.
_WORST = 5
_SLOTS = ("weight", "input", "query", "key", "value", "softmax")
_MEASURED = {"only this": "only_quantized", "all but this": "only_float", "moves": "moves"}
_HELP = {
    "layer": "",
    "kind": "",
    "shape": "",
    "groups": "number of groups that the channels of each image are assigned to, each with its own quantizer",
    "only this": "error of the network's outputs, relative to their norm, if only this layer is quantized",
    "all but this": "the same if all layers but this one are quantized; the difference to the whole error is what"
    " leaving this layer in float gains",
    "moves": "change of the network's outputs, relative to their norm, if the quantizers of this layer are removed; the"
    " weights were trained with quantizers and are not those of a float network",
    "bits": "bit-width of the tensor",
    "SQNR": "signal-to-quantization-noise ratio in dB; one bit is worth about 6 dB",
    "clipped": "share of the values outside the range of the codes",
    "codes": "share of the codes that occur, if there are enough values to tell",
    "range": "smallest and largest recorded value",
}


@dataclass(frozen=True)
class Figures:
    """Row of the summary: a quantity with its float and quantized value, as text, and a note."""

    name: str
    float: str
    quantized: str
    note: str = ""


@dataclass(frozen=True)
class RunReport:
    """Content of the report of one run.

    Attributes:
        title: Title of the page.
        lead: Introduction below the title.
        summary: Rows of float and quantized values.
        analysis: Analysis of the network.
        pictures: Bytes of PNG files, keyed by title; on the page, not in the JSON.
        environment: Machine, versions, seed and hashes, keyed by name.
        advice: Findings about the run as a whole.
        findings: Causes and remedies, keyed by the name of the layer.
        settings: Arguments of the method, keyed by name.
        plan: Plan as text; empty if it adds nothing to the table of layers.
        config: Settings as YAML or text.
        figures: Further figures of the method, for the JSON.
    """

    title: str
    lead: str
    summary: Sequence[Figures]
    analysis: Analysis
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    advice: Sequence[Finding] = ()
    findings: Mapping[str, Sequence[Finding]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""
    config: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def with_float(report: RunReport, metrics: Mapping[str, float]) -> RunReport:
    """Return a copy of a report with the float network's metrics, keyed by the names of the summary's rows."""
    rows = [replace(row, float=f"{metrics[row.name]:.4g}") if row.name in metrics else row for row in report.summary]
    return replace(report, summary=rows)


def report_folder(trainer: pl.Trainer, folder: Path | None) -> Path:
    """Return the given folder, the logger's, or without a logger the Trainer's; every rank has to call this."""
    return folder or trainer_path(trainer.log_dir or trainer.default_root_dir)


def write_report(folder: str | Path, *reports: RunReport) -> list[Path]:
    """Write ``quantization_report.html`` and ``quantization_report.json`` of one or several runs to a folder.

    Returns:
        Paths of both files.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": "lightning_quant report", "version": FORMAT, "runs": [as_json(report) for report in reports]}
    texts = {f"{NAME}.html": render(*reports), f"{NAME}.json": json.dumps(content, indent=1) + "\n"}
    for name, text in texts.items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def as_json(report: RunReport) -> dict[str, Any]:
    """Convert a report without its pictures to JSON values; numbers that are not finite become null."""
    analysis = asdict(report.analysis)
    for layer, row in zip(report.analysis.layers, analysis["layers"], strict=True):
        row["findings"] = [asdict(finding) for finding in report.findings.get(layer.name, ())]
    content = {
        "title": report.title,
        "lead": report.lead,
        "summary": [asdict(row) for row in report.summary],
        "advice": [asdict(finding) for finding in report.advice],
        "analysis": analysis,
        "figures": report.figures,
        "environment": report.environment,
        "plan": report.plan,
        "config": report.config,
    }
    cleaned: dict[str, Any] = _finite(content)
    return cleaned


def render(*reports: RunReport) -> str:
    """Render the page of one or several runs."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text: str = environment.get_template("report.html.j2").render(
        runs=[_template_values(report) for report in reports],
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=(PAGE / "script.js").read_text(encoding="utf-8"),
    )
    return text


def _template_values(report: RunReport) -> dict[str, Any]:
    """Collect the values of a run for the template."""
    analysis = report.analysis
    slots = [slot for slot in _SLOTS if any(slot in layer.tensors for layer in analysis.layers)]
    worst = [_in_words(layer, report) for layer in worst_layers(analysis)]
    measured = [
        title for title, name in _MEASURED.items() if any(getattr(layer, name) is not None for layer in analysis.layers)
    ]
    return {
        **{name: getattr(report, name) for name in ("title", "lead", "summary", "advice", "plan", "environment")},
        "config": report.config,
        "worst": worst,
        "unexplained": _unexplained(worst, report.settings),
        "pictures": [
            {"title": title, "data": base64.b64encode(picture).decode()} for title, picture in report.pictures.items()
        ],
        "columns": _columns(measured, slots),
        "rows": [_row(layer, measured, slots) for layer in analysis.layers],
        "layers_note": _layers_note(analysis),
    }


def worst_layers(analysis: Analysis, count: int = _WORST) -> list[LayerAnalysis]:
    """Return the layers that the network loses most by, or without sensitivities those with the lowest SQNR."""
    if any(layer.cost is not None for layer in analysis.layers):
        return sorted(analysis.layers, key=lambda layer: layer.cost or 0.0, reverse=True)[:count]
    noisy = [layer for layer in analysis.layers if layer.tensors]
    return sorted(noisy, key=lambda layer: min(figures.sqnr for figures in layer.tensors.values()))[:count]


def _in_words(layer: LayerAnalysis, report: RunReport) -> dict[str, Any]:
    analysis = report.analysis
    tensors = ", ".join(
        f"{slot} in {figures.bits} bits at {_sqnr(figures.sqnr)}" for slot, figures in layer.tensors.items()
    )
    if layer.only_quantized is not None and layer.only_float is not None and analysis.error is not None:
        text = (
            f"Quantized alone, it causes an error of {layer.only_quantized:.1%} of the outputs. With it in float the"
            f" whole error is {layer.only_float:.1%} instead of {analysis.error:.1%}. It has {tensors}."
        )
    elif layer.moves is not None:
        text = f"Without its quantizers the outputs move by {layer.moves:.1%} of their norm. It has {tensors}."
    else:
        text = f"It has {tensors}."
    return {"name": layer.name, "text": text, "findings": report.findings.get(layer.name, ())}


def _unexplained(worst: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Suggest a remedy for layers without findings."""
    names = [layer["name"] for layer in worst if not layer["findings"]]
    if not names:
        return ""
    layers = "these layers" if len(names) == len(worst) else ", ".join(names)
    return f"The figures of {layers} show no cause: leave them in float, {joint_line(names, settings)}."


def _layers_note(analysis: Analysis) -> str:
    count, in_float = len(analysis.layers), len(analysis.left_out)
    note = f"{count} quantized, {in_float} linear layers and convolutions left in float"
    names = f" ({', '.join(analysis.left_out)})" if 0 < in_float <= 8 else ""
    return f"{note}{names}. Measured on {analysis.images} rows of recorded calls. Click a heading to sort."


def _columns(measured: Sequence[str], slots: Sequence[str]) -> list[dict[str, Any]]:
    numbers = dict.fromkeys(("layer", "kind", "shape"), False) | dict.fromkeys(("groups", *measured), True)
    columns = [{"title": title, "number": number, "help": _HELP[title]} for title, number in numbers.items()]
    for slot in slots:
        for title in ("bits", "SQNR", "clipped", "codes", "range"):
            # Explained only once.
            explanation = _HELP[title] if slot == slots[0] else ""
            columns.append({"title": f"{slot} {title}", "number": title != "range", "help": explanation})
    return columns


def _row(layer: LayerAnalysis, measured: Sequence[str], slots: Sequence[str]) -> list[dict[str, Any]]:
    cells = [_cell(layer.name), _cell(layer.kind), _cell("x".join(map(str, layer.shape)))]
    cells.append(_number(layer.groups or None, "d"))
    cells += [_number(getattr(layer, _MEASURED[title]), ".2%") for title in measured]
    for slot in slots:
        figures = layer.tensors.get(slot)
        if figures is None:
            cells += [*[_number(None, "")] * 4, _cell("")]
            continue
        cells += [
            _number(figures.bits, "d"),
            _number(figures.sqnr, ".1f"),
            _number(figures.clipped, ".2%"),
            _number(figures.codes_used, ".0%"),
            _cell(f"{figures.low:.3g} to {figures.high:.3g}"),
        ]
    return cells


def _cell(text: str) -> dict[str, Any]:
    return {"text": text, "value": text, "number": False}


def _number(value: float | None, spec: str) -> dict[str, Any]:
    text = "" if value is None else format(value, spec) if math.isfinite(value) else "exact"
    return {"text": text, "value": "" if value is None else value, "number": True}


def _sqnr(value: float) -> str:
    return f"{value:.0f} dB" if math.isfinite(value) else "no noise"


def _finite(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
