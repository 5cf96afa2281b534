"""What a calibration came to, in a few lines."""

from __future__ import annotations

from collections import Counter

from lightning_quant.igq_vit.allocation import candidates
from lightning_quant.igq_vit.calibration import INPUT, REPLAYED_PASSES, SOFTMAX, Calibration
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.sensitivity import HELD_VALUES, PROBES
from lightning_quant.utilities.text import duration


def summarize(calibration: Calibration, seconds: float | None = None) -> str:
    """Time, groups and bit operations.

    Args:
        calibration: finished.
        seconds: that it took, where known.
    """
    settings, plan = calibration.source.plan.settings, calibration.source.plan
    took = "" if seconds is None else f" in {seconds:.1f} s"
    lines = [f"Calibrated on {settings.calibration_images} images{took}. {plan.summary()}"]
    if calibration.groups:
        for slot, word in ((INPUT, "channels"), (SOFTMAX, "softmax rows")):
            counts = sorted(Counter(g for (_, kind), g in calibration.groups.items() if kind == slot).items())
            lines.append(f"Groups of {word}: " + ", ".join(f"{groups} in {layers} layers" for groups, layers in counts))
    grouped = settings.scheme == "igq"
    chosen = {name: groups for (name, kind), groups in calibration.groups.items() if kind == INPUT}
    bops = plan.bops(chosen or (settings.groups if grouped else 0)).total
    plain = plan.bops(0).total
    size = f"{bops / 1e9:.1f} G" if bops > 1e9 else f"{bops / 1e6:.1f} M"
    lines.append(f"Bit operations of an image: {size}, {100 * (bops / plain - 1):+.1f} % to layer-wise.")
    return "\n".join(lines)


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
