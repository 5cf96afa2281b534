"""One run as one page: a self-contained HTML file, and the same figures as JSON."""

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
# Layers that are described in words.
_WORST = 5
_SLOTS = ("weight", "input", "query", "key", "value", "softmax")
_MEASURED = {"only this": "only_quantized", "all but this": "only_float", "moves": "moves"}
_HELP = {
    "layer": "",
    "kind": "",
    "shape": "",
    "groups": "quantizers among which the channels of each image choose",
    "only this": "error of the network's outputs, of their norm, where only this one is quantized",
    "all but this": "the same where all but this one are quantized: how much less than the whole error it is says what"
    " is gained by leaving it in float",
    "moves": "how far the network's outputs move, of their norm, when the quantizers of this one are taken off: its"
    " weights were trained with them, and are no float network without",
    "bits": "of this tensor",
    "SQNR": "signal to quantization noise in dB; a bit is worth about 6",
    "clipped": "share of the values that lie outside the codes",
    "codes": "share of the codes that occur, where there are values enough to tell",
    "range": "smallest and largest value that was seen",
}


@dataclass(frozen=True)
class Figures:
    """A row of the summary: what is compared, in float and quantized, as numbers or as text."""

    name: str
    float: str
    quantized: str
    note: str = ""


@dataclass(frozen=True)
class RunReport:
    """What there is to say of one run.

    Attributes:
        title: of the page.
        lead: one sentence.
        summary: rows of float against quantized.
        analysis: of the network.
        pictures: bytes of PNG files by their titles; in the page, not in the JSON.
        environment: machine, versions, seeds and hashes, by name.
        advice: what the run as a whole suggests.
        findings: Causes and remedies by the name of the layer.
        settings: Arguments of the method, by name.
        plan: as text; empty where the table of layers says all.
        config: settings as YAML or text.
        figures: further figures of the method, for the JSON.
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
    """The same report with what the float network reached, by the names of the summary's rows."""
    rows = [replace(row, float=f"{metrics[row.name]:.4g}") if row.name in metrics else row for row in report.summary]
    return replace(report, summary=rows)


def report_folder(trainer: pl.Trainer, folder: Path | None) -> Path:
    """The folder that was given, or the logger's, or without logger the Trainer's; all ranks have to ask."""
    return folder or trainer_path(trainer.log_dir or trainer.default_root_dir)


def write_report(folder: str | Path, *reports: RunReport) -> list[Path]:
    """Write ``quantization_report.html`` and ``quantization_report.json`` of one run or several into a folder.

    Returns:
        both paths.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": "lightning_quant report", "version": FORMAT, "runs": [as_json(each) for each in reports]}
    texts = {f"{NAME}.html": render(*reports), f"{NAME}.json": json.dumps(content, indent=1) + "\n"}
    for name, text in texts.items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def as_json(report: RunReport) -> dict[str, Any]:
    """All but the pictures, as values of JSON: what is not finite is null."""
    analysis = asdict(report.analysis)
    for layer, row in zip(report.analysis.layers, analysis["layers"], strict=True):
        row["findings"] = [asdict(finding) for finding in report.findings.get(layer.name, ())]
    found = {
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
    cleaned: dict[str, Any] = _finite(found)
    return cleaned


def render(*reports: RunReport) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text: str = environment.get_template("report.html.j2").render(
        runs=[_shown(report) for report in reports],
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=(PAGE / "script.js").read_text(encoding="utf-8"),
    )
    return text


def _shown(report: RunReport) -> dict[str, Any]:
    """What the template takes of a run."""
    analysis = report.analysis
    slots = [slot for slot in _SLOTS if any(slot in layer.tensors for layer in analysis.layers)]
    worst = [_in_words(layer, report) for layer in worst_layers(analysis)]
    measured = [
        title for title, name in _MEASURED.items() if any(getattr(each, name) is not None for each in analysis.layers)
    ]
    return {
        **{name: getattr(report, name) for name in ("title", "lead", "summary", "advice", "plan", "environment")},
        "config": report.config,
        "worst": worst,
        "plain": _plain(worst, report.settings),
        "pictures": [
            {"title": title, "data": base64.b64encode(picture).decode()} for title, picture in report.pictures.items()
        ],
        "columns": _columns(measured, slots),
        "rows": [_row(layer, measured, slots) for layer in analysis.layers],
        "layers_note": _layers_note(analysis),
    }


def worst_layers(analysis: Analysis, count: int = _WORST) -> list[LayerAnalysis]:
    """Those by which the network loses most; without sensitivities those with the least signal to noise."""
    if any(layer.cost is not None for layer in analysis.layers):
        return sorted(analysis.layers, key=lambda layer: layer.cost or 0.0, reverse=True)[:count]
    noisy = [layer for layer in analysis.layers if layer.tensors]
    return sorted(noisy, key=lambda layer: min(figures.sqnr for figures in layer.tensors.values()))[:count]


def _in_words(layer: LayerAnalysis, report: RunReport) -> dict[str, Any]:
    analysis = report.analysis
    says = ", ".join(
        f"{slot} in {figures.bits} bits at {_sqnr(figures.sqnr)}" for slot, figures in layer.tensors.items()
    )
    if layer.only_quantized is not None and layer.only_float is not None and analysis.error is not None:
        says = (
            f"Alone it makes an error of {layer.only_quantized:.1%} of the outputs; with it in float the whole error is"
            f" {layer.only_float:.1%} in place of {analysis.error:.1%}. It has {says}."
        )
    elif layer.moves is not None:
        says = f"With its quantizers off the outputs move by {layer.moves:.1%} of their norm. It has {says}."
    else:
        says = f"It has {says}."
    return {"name": layer.name, "says": says, "findings": report.findings.get(layer.name, ())}


def _plain(worst: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Of layers whose figures say nothing."""
    names = [layer["name"] for layer in worst if not layer["findings"]]
    if not names:
        return ""
    which = "these layers" if len(names) == len(worst) else ", ".join(names)
    return f"Nothing stands out in the figures of {which}: float is what helps, {joint_line(names, settings)}."


def _layers_note(analysis: Analysis) -> str:
    count, left = len(analysis.layers), len(analysis.left_out)
    note = f"{count} quantized, {left} linear layers and convolutions left in float"
    names = f" ({', '.join(analysis.left_out)})" if 0 < left <= 8 else ""
    return f"{note}{names}. Measured on {analysis.images} rows of recorded calls. Click on a heading to sort."


def _columns(measured: Sequence[str], slots: Sequence[str]) -> list[dict[str, Any]]:
    numbers = dict.fromkeys(("layer", "kind", "shape"), False) | dict.fromkeys(("groups", *measured), True)
    columns = [{"title": title, "number": number, "help": _HELP[title]} for title, number in numbers.items()]
    for slot in slots:
        for title in ("bits", "SQNR", "clipped", "codes", "range"):
            # Explained once.
            explained = _HELP[title] if slot == slots[0] else ""
            columns.append({"title": f"{slot} {title}", "number": title != "range", "help": explained})
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
    shown = "" if value is None else format(value, spec) if math.isfinite(value) else "exact"
    return {"text": shown, "value": "" if value is None else value, "number": True}


def _sqnr(value: float) -> str:
    return f"{value:.0f} dB" if math.isfinite(value) else "no noise"


def _finite(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(key): _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
