"""What a calibration came to, in a few lines."""

from __future__ import annotations

from collections import Counter

from lightning_quant.igq_vit.session import INPUT, SOFTMAX, Calibration


def summarise(calibration: Calibration, seconds: float | None = None) -> str:
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
