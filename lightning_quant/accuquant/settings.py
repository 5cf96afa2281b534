"""Settings of a calibration, validated at construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning_quant.accuquant.windows import Adjoint
from lightning_quant.calibration.settings import CalibrationSettings
from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.grid import check_bits

ActivationParameters = Literal["shared", "per_group"]
Start = Literal["float", "prefix"]
Learn = Literal["all", "rounding", "activations"]


@dataclass(frozen=True)
class Settings(CalibrationSettings):
    """Arguments of :class:`lightning_quant.AccuQuant` that determine what the quantized denoiser computes.

    Raises:
        ConfigurationError: Value out of range.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    steps: int = 50
    window: int | Literal["sweep"] | None = None
    adjoint: Adjoint = "identity"
    start: Start = "float"
    activation_parameters: ActivationParameters = "shared"
    learn: Learn = "all"
    weight_scales: bool = False
    updates: int = 300
    batch_size: int = 8
    trajectories: int = 256
    held_out: int = 32
    reconstruction: int = 0
    rounding_lr: float = 3e-3
    activation_lr: float = 3e-4
    check_every: int = 20
    patience: int = 5
    first_and_last_bits: int = 8
    softmax_bits: int = 8
    eta: float = 0.0
    guidance: float | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_and_last_bits", "softmax_bits"):
            check_bits(getattr(self, name), name)
        self._check_counts()
        for name in ("rounding_lr", "activation_lr"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected a positive number.")
        self.check_choices(adjoint=Adjoint, start=Start, activation_parameters=ActivationParameters, learn=Learn)

    def _check_counts(self) -> None:
        smallest = {"reconstruction": 0, "updates": 0}
        counts = ("steps", "batch_size", "trajectories", "held_out", "check_every", "patience", *smallest)
        for name in counts:
            value, least = getattr(self, name), smallest.get(name, 1)
            if not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{name}={value!r}: expected a whole number of at least {least}.")
        if self.batch_size > self.trajectories:
            raise ConfigurationError(
                f"batch_size={self.batch_size} with trajectories={self.trajectories}: a batch is drawn from the"
                f" trajectories, write trajectories={self.batch_size} or more."
            )
        window: Any = self.window
        if window is None or window == "sweep":
            return
        if not isinstance(window, int) or window < 1:
            raise ConfigurationError(
                f"window={window!r}: expected a number of steps, 'sweep', or None for the default of"
                f" {usual_window(self.steps)} with {self.steps} steps."
            )
        if window > self.steps:
            raise ConfigurationError(
                f"window={window} is longer than the trajectory of {self.steps} steps: write window="
                f"{usual_window(self.steps)}, or leave it out."
            )


def usual_window(steps: int) -> int:
    """Return the default window length, a twentieth to a tenth of the steps.

    This gives the paper's windows: 5 of 50 and of 100 steps, 10 of 200. The minimum is 4: with 20 steps, windows of 2
    were worse than those of 4 and of 10.

    Example:
        >>> [usual_window(steps) for steps in (3, 10, 20, 50, 100, 200)]
        [3, 4, 4, 5, 5, 10]
    """
    return min(max(4, min(steps // 10, 5), steps // 20), steps)


def windows_of(steps: int, window: int) -> list[range]:
    """Return consecutive windows that cover all steps; the last may be shorter.

    Example:
        >>> windows_of(7, 3)
        [range(0, 3), range(3, 6), range(6, 7)]
    """
    return [range(start, min(start + window, steps)) for start in range(0, steps, window)]
