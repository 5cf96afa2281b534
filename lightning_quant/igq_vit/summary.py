"""Estimate before and summary after a calibration, in a few lines of text."""

from __future__ import annotations

from collections import Counter

from lightning_quant.igq_vit.allocation import candidates
from lightning_quant.igq_vit.calibration import INPUT, REPLAYED_PASSES, SOFTMAX, Calibration
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.sensitivity import HELD_VALUES, PROBES
from lightning_quant.utilities.text import duration


def summarize(calibration: Calibration, seconds: float | None = None) -> str:
    """Summarize time, groups and bit operations.

    Args:
        calibration: Finished calibration.
        seconds: Duration of the calibration, or None if unknown.
    """
    settings, plan = calibration.source.plan.settings, calibration.source.plan
    time = "" if seconds is None else f" in {seconds:.1f} s"
    lines = [f"Calibrated on {settings.calibration_images} images{time}. {plan.summary()}"]
    if calibration.groups:
        for slot, word in ((INPUT, "channels"), (SOFTMAX, "softmax rows")):
            counts = sorted(Counter(g for (_, kind), g in calibration.groups.items() if kind == slot).items())
            lines.append(f"Groups of {word}: " + ", ".join(f"{groups} in {layers} layers" for groups, layers in counts))
    grouped = settings.scheme == "igq"
    chosen = {name: groups for (name, kind), groups in calibration.groups.items() if kind == INPUT}
    bops = plan.bops(chosen or (settings.groups if grouped else 0)).total
    layer_wise = plan.bops(0).total
    size = f"{bops / 1e9:.1f} G" if bops > 1e9 else f"{bops / 1e6:.1f} M"
    lines.append(f"Bit operations per image: {size}, {100 * (bops / layer_wise - 1):+.1f} % relative to layer-wise.")
    return "\n".join(lines)


# Cost of fitting all quantizers once in forward passes, measured on ViT-S and Swin-T (benchmarks/igq_time.py).
PASSES_TO_FIT = 15
# The same with all candidate numbers of groups.
PASSES_TO_FIT_CANDIDATES = 60
# Forward and backward passes of the estimates, and the float pass that is replayed.
PASSES_TO_ESTIMATE = 12
# A replay from a block in the middle of the network.
PASSES_TO_PERTURB = 0.6


def units(calibration: Calibration) -> int:
    """Count the units of the progress bar: the modules of the first step, unless it is done, and the later steps."""
    modules = calibration.source.plan.names("grouped", "one token", "patch", "attention")
    return (0 if calibration.done else len(modules)) + calibration.total - max(calibration.done, 1)


def estimate(plan: VitPlan, seconds: float, images: int) -> str:
    """Estimate time and memory of a calibration in one sentence.

    Args:
        plan: Plan of the network.
        seconds: Duration of a float forward pass of one image.
        images: Number of calibration images of this rank.
    """
    sizes = [plan.shape(name).tokens * plan.shape(name).in_features for name in plan.names("grouped")]
    values = images * max(sizes) * 8
    if plan.settings.allocates:
        one = sum(sizes) * (PROBES + 1)
        values = max(values, one, min(images * one, HELD_VALUES))
    megabytes = values * 4 / 1e6
    fitting, measuring = passes(plan)
    total = fitting + measuring
    choice = f" (allocate=False: {PASSES_TO_FIT}, {duration(PASSES_TO_FIT * seconds * images)})"
    return (
        f"Calibration on {images} images in this process: about {total:.0f} forward passes over them,"
        f" {duration(total * seconds * images)}{choice if measuring else ''}, and about {megabytes:.0f} MB in addition"
        " to the network."
    )


def passes(plan: VitPlan) -> tuple[float, float]:
    """Return the cost of a calibration in forward passes: of fitting quantizers, and of measuring perturbations."""
    settings = plan.settings
    if not settings.allocates:
        return PASSES_TO_FIT, 0
    slots = [(plan.shape(name).in_features, settings.groups) for name in plan.names("grouped")]
    slots += [(plan.softmax_rows(name), settings.row_groups) for name in plan.names("attention")]
    table = PASSES_TO_PERTURB * sum(len(candidates(limit, groups)) for limit, groups in slots)
    return PASSES_TO_FIT_CANDIDATES, PASSES_TO_ESTIMATE + min(REPLAYED_PASSES, table)
