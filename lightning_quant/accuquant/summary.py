"""What a calibration came to, in a few lines."""

from __future__ import annotations

from lightning_quant.accuquant.calibration import STAGES, Calibration


def summarize(calibration: Calibration, seconds: float | None = None) -> str:
    """Errors before and after, the window and the time.

    Args:
        calibration: finished.
        seconds: that it took, where known.
    """
    source, errors = calibration.source, calibration.errors
    took = "" if seconds is None else f" in {seconds:.0f} s"
    lines = [
        f"Calibrated{took} over windows of {calibration.window} of {source.steps} steps. {source.plan.summary()}",
        "Error at the end of held-out trajectories (RMSE to the float model): "
        + ", ".join(f"{name} {float(errors[key][-1]):.4f}" for key, name in STAGES.items() if key in errors)
        + ".",
    ]
    if calibration.sweep:
        tried = ", ".join(f"{length}: {error:.4f}" for length, error in sorted(calibration.sweep.items()))
        lines.append(f"Window lengths tried with the same number of network calls: {tried}.")
    if calibration.updates < source.settings.updates:
        lines.append(f"Stopped after {calibration.updates} of {source.settings.updates} updates: no gain any more.")
    return "\n".join(lines)
