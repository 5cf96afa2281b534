"""`lightning-quant demo`: the three methods on the digits that ship with scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_quant.demo import accuquant, igq_vit, int4_training
from lightning_quant.demo.terminal import one_thread, quiet
from lightning_quant.report import RunReport, write_report
from lightning_quant.utilities.paths import check_writable, user_path

METHODS = (int4_training, igq_vit, accuquant)


def main(output: str | Path = "demo", seed: int = 0) -> None:
    """Run each method on the digits, print its results, and write them to ``report.json``.

    Args:
        output: Folder for ``quantization_report.html``, ``report.json``, the pictures and the files of each method;
            results of an earlier demo are replaced.
        seed: Seed of the first run of each kind; further runs use the following seeds.

    Raises:
        ConfigurationError: Path of a file, or a folder that is not writable.
    """
    output = user_path(output)
    check_writable(output)
    console, reports = Console(), list[RunReport]()
    for method in METHODS:
        with quiet(), one_thread():
            outcome = method.run(console, output, seed)
        _write_report(output / "report.json", method.METHOD, outcome.figures)
        reports.append(outcome.report)
        console.print()
    page, _ = write_report(output, *reports)
    console.print(
        f"Report of all three methods, for a browser: {page}\n"
        f"Figures as JSON: {output / 'report.json'}. More to run: lightning-quant configs",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _write_report(path: Path, method: str, figures: Mapping[str, Any]) -> None:
    """Write the figures of a method into the file, beside those of other methods."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        report = {}
    report = report if isinstance(report, dict) else {}
    report[method] = {name: _rounded(value) for name, value in figures.items()}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    return {key: _rounded(entry) for key, entry in value.items()} if isinstance(value, Mapping) else round(value, 4)
