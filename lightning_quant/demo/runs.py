"""Trainer and outcome that the demos of all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_quant.report import RunReport

TEST_IMAGES = 360

cpu_trainer = partial(
    pl.Trainer,
    accelerator="cpu",
    devices=1,
    limit_val_batches=0,
    enable_checkpointing=False,
    enable_model_summary=False,
)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a method's demo.

    Attributes:
        figures: Figures for ``report.json``.
        report: Report of the run that is shown.
    """

    figures: Mapping[str, Any]
    report: RunReport
