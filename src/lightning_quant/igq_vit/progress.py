"""What a user sees of a calibration before and while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_quant.igq_vit.allocation import candidates
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.session import Calibration

# Forward passes' worth of fitting all quantizers once, measured on ViT-S and Swin-T (benchmarks/igq_time.py).
PASSES_TO_FIT = 15
# A pass from a block in the middle on.
PASSES_TO_PERTURB = 0.6


class CalibrationBar:
    """A progress bar with the time left, on the first rank, where the Trainer shows bars.

    Args:
        trainer: whose progress bar is switched on or off.
        calibration: its steps and modules are what is counted.
    """

    def __init__(self, trainer: pl.Trainer, calibration: Calibration) -> None:
        shown = trainer.is_global_zero and getattr(trainer, "progress_bar_callback", None) is not None
        modules = (
            0 if calibration.done else len(calibration.source.plan.names("grouped", "one token", "patch", "attention"))
        )
        self.bar: Any = Tqdm(
            total=modules + calibration.total - max(calibration.done, 1),
            desc="Calibrating",
            disable=not shown,
            leave=False,
        )

    def module_done(self, name: str) -> None:
        """Count one module of the first step."""
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update()

    def done(self, what: str) -> None:
        """Count one of the later steps."""
        self.bar.set_postfix_str(what, refresh=False)
        if what != "quantizers":
            self.bar.update()

    def __enter__(self) -> CalibrationBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()


def estimate(plan: VitPlan, seconds: float, images: int) -> str:
    """One sentence on time and memory.

    Args:
        plan: of the network.
        seconds: that a float forward of one image took.
        images: calibration images of this rank.
    """
    passes: float = PASSES_TO_FIT
    if plan.settings.allocates:
        for name in plan.names("grouped"):
            passes += PASSES_TO_PERTURB * len(candidates(plan.shape(name).in_features, plan.settings.groups))
        for name in plan.names("attention"):
            passes += PASSES_TO_PERTURB * len(candidates(plan.softmax_rows(name), plan.settings.row_groups))
    largest = max(plan.shape(name).tokens * plan.shape(name).in_features for name in plan.names("grouped"))
    megabytes = images * largest * 4 * 8 / 1e6
    time = _time(passes * seconds * images)
    return (
        f"Calibration on {images} images of this process: about {passes:.0f} forward passes of them, {time},"
        f" and about {megabytes:.0f} MB beside the network."
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
