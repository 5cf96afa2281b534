"""How long a calibration will take, before and while it runs."""

from __future__ import annotations

from lightning_quant.igq_vit.allocation import candidates
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.session import Calibration
from lightning_quant.tasks.calibration_progress import duration

# Forward passes' worth of fitting all quantizers once, measured on ViT-S and Swin-T (benchmarks/igq_time.py).
PASSES_TO_FIT = 15
# A pass from a block in the middle on.
PASSES_TO_PERTURB = 0.6


def units(calibration: Calibration) -> int:
    """What a progress bar counts: the modules of the first step, where it is not done yet, and the steps after it."""
    modules = calibration.source.plan.names("grouped", "one token", "patch", "attention")
    return (0 if calibration.done else len(modules)) + calibration.total - max(calibration.done, 1)


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
    time = duration(passes * seconds * images)
    return (
        f"Calibration on {images} images of this process: about {passes:.0f} forward passes of them, {time},"
        f" and about {megabytes:.0f} MB beside the network."
    )
