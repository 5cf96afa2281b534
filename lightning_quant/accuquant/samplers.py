"""Differentiable counterparts of the step functions of diffusers' schedulers."""

from __future__ import annotations

import copy
import math
from typing import Any

from lightning_quant.accuquant.multistep import DPMSolverSampler, PNDMSampler
from lightning_quant.accuquant.single_step import DDIMSampler, DDPMSampler
from lightning_quant.accuquant.stepping import History, Sampler
from lightning_quant.errors import ConfigurationError, UnsupportedModelError

__all__ = [
    "SUPPORTED",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "History",
    "PNDMSampler",
    "Sampler",
    "sampler_of",
]

SUPPORTED: dict[str, type[Sampler]] = {
    "DDIMScheduler": DDIMSampler,
    "DDPMScheduler": DDPMSampler,
    "PNDMScheduler": PNDMSampler,
    "DPMSolverMultistepScheduler": DPMSolverSampler,
}

_WHY = {
    "prediction_type": "the step cannot derive the image from such an output",
    "thresholding": "its limit is a quantile of each image, which differs between the float and the quantized image",
    "variance_type": "a learned variance is in further channels of the output; fixed_large_log gives NaN in diffusers",
    "algorithm_type": "only the deterministic solver of the data prediction is implemented",
    "solver_order": "only one earlier prediction is kept",
}


def sampler_of(scheduler: Any, steps: int, eta: float = 0.0) -> Sampler:
    """Return the steps of a diffusers scheduler as pure differentiable functions.

    The scheduler is not changed. The sampler uses its timesteps and tables; a chain of steps equals one of
    ``scheduler.step`` up to a relative error of 1e-6.

    Args:
        scheduler: Scheduler, a DDIMScheduler, DDPMScheduler, PNDMScheduler or DPMSolverMultistepScheduler.
        steps: Number of steps for ``scheduler.set_timesteps``; a sampler may call the network more often.
        eta: DDIM's eta: 0 is deterministic, 1 is as noisy as DDPM.

    Raises:
        UnsupportedModelError: Another scheduler, or a subclass that overrides the step.
        ConfigurationError: Steps out of range, an unsupported option or prediction type, or values with which
            diffusers would compute NaN.

    Example:
        >>> from diffusers import PNDMScheduler
        >>> sampler_of(PNDMScheduler(skip_prk_steps=True), steps=4).timesteps
        (750, 500, 500, 250, 0)
    """
    name = _kind(scheduler)
    kind = SUPPORTED[name]
    _check_options(scheduler, name)
    if not (math.isfinite(eta) and eta >= 0):
        raise ConfigurationError(f"eta={eta}: expected a number from 0 (deterministic) to 1 (as noisy as DDPM).")
    if eta and kind is not DDIMSampler:
        raise ConfigurationError(
            f"eta={eta} belongs to DDIM, found {name}: write eta=0.0, or "
            "scheduler = DDIMScheduler.from_config(scheduler.config)."
        )
    prepared = _with_timesteps(scheduler, name, steps)
    return DDIMSampler(prepared, eta) if kind is DDIMSampler else kind(prepared)


def _kind(scheduler: Any) -> str:
    """Return the name of the supported class that the scheduler is; by name, to avoid importing diffusers."""
    kind: Any = type(scheduler)
    for cls in kind.__mro__:
        if cls.__name__ in SUPPORTED and cls.__module__.split(".")[0] == "diffusers":
            break
    else:
        raise UnsupportedModelError(
            f"{kind.__name__} is not a supported scheduler; supported are {', '.join(SUPPORTED)}: "
            "write for example scheduler = DDIMScheduler.from_config(scheduler.config)."
        )
    if kind.step is not cls.step:
        raise UnsupportedModelError(
            f"{kind.__name__} overrides the step of {cls.__name__}, and the override would be ignored: write "
            f"scheduler = {cls.__name__}.from_config(scheduler.config) if the original step is sufficient."
        )
    return str(cls.__name__)


def _check_options(scheduler: Any, name: str) -> None:
    for option, supported in SUPPORTED[name].OPTIONS.items():
        value = scheduler.config.get(option, supported[0])
        if value in supported:
            continue
        expected = ", ".join(map(repr, supported))
        advice = (
            "write the one of them that the network was trained with"
            if option == "prediction_type"
            else f"write scheduler = {name}.from_config(scheduler.config, {option}={supported[0]!r})"
        )
        why = f" ({_WHY[option]})" if option in _WHY else ""
        raise ConfigurationError(f"{option}={value!r} of {name} is not supported{why}; expected {expected}: {advice}.")


def _with_timesteps(scheduler: Any, name: str, steps: int) -> Any:
    """Copy a scheduler and set its timesteps; a shallow copy suffices, as ``set_timesteps`` replaces attributes."""
    most = int(scheduler.config.num_train_timesteps)
    least = 1 if scheduler.config.get("skip_prk_steps", True) else 4
    if not least <= steps <= most:
        hint = "; or with skip_prk_steps=True from 1" if least > 1 else ""
        raise ConfigurationError(
            f"steps={steps}: expected {least} .. {most}, as many as {name} was trained with{hint}."
        )
    copied = copy.copy(scheduler)
    try:
        copied.set_timesteps(steps)
    except ValueError as error:
        raise ConfigurationError(f"{name} has no timesteps for steps={steps}: {error}") from error
    outside = [int(t) for t in copied.timesteps if not 0 <= t < most]
    if outside:
        raise ConfigurationError(
            f"{name} with steps={steps} asks for timestep {outside[0]}, expected 0 .. {most - 1}: write fewer steps, "
            f"or a scheduler with another steps_offset (found {scheduler.config.get('steps_offset')}) or "
            f"timestep_spacing (found {scheduler.config.get('timestep_spacing')!r})."
        )
    return copied
