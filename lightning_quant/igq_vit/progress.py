"""How long a calibration will take, before and while it runs."""

from __future__ import annotations

from lightning_quant.igq_vit.allocation import candidates
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.sensitivity import HELD_VALUES, PROBES
from lightning_quant.igq_vit.session import REPLAYED_PASSES, Calibration
from lightning_quant.tasks.calibration_progress import duration

# Forward passes' worth of fitting all quantizers once, measured on ViT-S and Swin-T (benchmarks/igq_time.py).
PASSES_TO_FIT = 15
# With all numbers of groups to choose from.
PASSES_TO_FIT_CANDIDATES = 70
# Forward and backward passes of the estimates, and a pass in float that is replayed.
PASSES_TO_ESTIMATE = 12
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
    sizes = [plan.shape(name).tokens * plan.shape(name).in_features for name in plan.names("grouped")]
    values = images * max(sizes) * 8
    if plan.settings.allocates:
        one = sum(sizes) * (PROBES + 1)
        values = max(values, one, min(images * one, HELD_VALUES))
    megabytes = values * 4 / 1e6
    fitted, allocated = passes(plan)
    total = fitted + allocated
    choice = f" (allocate=False: {PASSES_TO_FIT}, {duration(PASSES_TO_FIT * seconds * images)})"
    return (
        f"Calibration on {images} images of this process: about {total:.0f} forward passes of them,"
        f" {duration(total * seconds * images)}{choice if allocated else ''}, and about {megabytes:.0f} MB beside the"
        " network."
    )


def passes(plan: VitPlan) -> tuple[float, float]:
    """Forward passes' worth of a calibration: of fitting quantizers, and of measuring what groups gain."""
    settings = plan.settings
    if not settings.allocates:
        return PASSES_TO_FIT, 0
    slots = [(plan.shape(name).in_features, settings.groups) for name in plan.names("grouped")]
    slots += [(plan.softmax_rows(name), settings.row_groups) for name in plan.names("attention")]
    table = PASSES_TO_PERTURB * sum(len(candidates(limit, groups)) for limit, groups in slots)
    return PASSES_TO_FIT_CANDIDATES, PASSES_TO_ESTIMATE + min(REPLAYED_PASSES, table)
