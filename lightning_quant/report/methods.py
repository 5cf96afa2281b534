"""Choice of the report section for the method of a run."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl

from lightning_quant.calibration.callback import CalibratingCallback
from lightning_quant.calibration.module import CalibratingModule
from lightning_quant.calibration.record import Record
from lightning_quant.gradient import GradientQuantization
from lightning_quant.report.groups import GroupSection
from lightning_quant.report.intervals import TrainingSection
from lightning_quant.report.section import Section
from lightning_quant.report.trajectories import Generating, GenerationReport, WindowSection


def section_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Section:
    """Return the section for the method of a run's module or callbacks, or a plain one if neither has a method."""
    holders: list[object] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]  # the Trainer sets it elsewhere
    reports = (holder.generation_report for holder in holders if isinstance(holder, Generating))
    generated = next(reports, GenerationReport())
    sections: dict[str, Callable[[Record], Section]] = {
        "IGQViT": GroupSection,
        "AccuQuant": lambda record: WindowSection(record, generated),
    }
    for holder in holders:
        if isinstance(holder, CalibratingModule | CalibratingCallback) and holder.callback_name in sections:
            return sections[holder.callback_name](holder.record)
        if isinstance(holder, GradientQuantization):
            return TrainingSection(holder)
    return WindowSection({}, generated) if generated else Section()
