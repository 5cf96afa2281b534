"""Summary of a calibration in a few lines."""

from __future__ import annotations

from lightning_quant.accuquant.calibration import STAGES, Calibration


def summarize(calibration: Calibration, seconds: float | None = None) -> str:
    """Summarize the window, the time, and the errors before and after a calibration.

    Args:
        calibration: Finished calibration.
        seconds: Duration in seconds; None leaves it out.
    """
    source, errors = calibration.source, calibration.errors
    time = "" if seconds is None else f" in {seconds:.0f} s"
    lines = [
        f"Calibrated{time} over windows of {calibration.window} of {source.steps} steps. {source.plan.summary()}",
        "Error at the end of held-out trajectories (RMSE to the float model): "
        + ", ".join(f"{name} {float(errors[key][-1]):.4f}" for key, name in STAGES.items() if key in errors)
        + ".",
    ]
    if calibration.sweep:
        lengths = ", ".join(f"{length}: {error:.4f}" for length, error in sorted(calibration.sweep.items()))
        lines.append(f"Error by window length, each tried with the same number of network calls: {lengths}.")
    if calibration.updates < source.settings.updates:
        lines.append(f"Stopped after {calibration.updates} of {source.settings.updates} updates: no improvement.")
    return "\n".join(lines)
