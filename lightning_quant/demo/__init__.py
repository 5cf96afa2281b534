"""`lightning-quant demo`: what the methods do, on data that ships with a dependency."""

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
    """Run each method on the digits, print what came out, and write it to ``report.json``.

    Args:
        output: folder for ``quantization_report.html``, ``report.json``, the pictures, and what each method leaves;
            what an earlier demo left there is replaced.
        seed: of the first run of each kind; the others follow it.

    Raises:
        ConfigurationError: if ``output`` is a file, or cannot be written to.
    """
    output = user_path(output)
    check_writable(output)
    console, reports = Console(), list[RunReport]()
    for method in METHODS:
        with quiet(), one_thread():
            found = method.run(console, output, seed)
        _write_report(output / "report.json", method.METHOD, found.figures)
        reports.append(found.report)
        console.print()
    page, _ = write_report(output, *reports)
    console.print(
        f"Report of all three, for a browser: {page}\n"
        f"Figures of all: {output / 'report.json'}. More to run: lightning-quant configs",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _write_report(path: Path, method: str, found: Mapping[str, Any]) -> None:
    """Write accuracies, in [0, 1], or several figures each, beside what other methods have in the file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        report = {}
    report = report if isinstance(report, dict) else {}
    report[method] = {name: _rounded(value) for name, value in found.items()}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    return {key: _rounded(each) for key, each in value.items()} if isinstance(value, Mapping) else round(value, 4)
