"""Differentiable twins of the step functions of diffusers' schedulers."""

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
    "prediction_type": "the step does not know what such an output says of the image",
    "thresholding": "its limit is a quantile of each image, which the float and the quantized image do not share",
    "variance_type": "a learned one is in further channels of the output; with fixed_large_log diffusers gives NaN",
    "algorithm_type": "only the deterministic solver of the data prediction is written",
    "solver_order": "one earlier prediction is kept",
}


def sampler_of(scheduler: Any, steps: int, eta: float = 0.0) -> Sampler:
    """The steps that a diffusers scheduler takes, as pure differentiable functions.

    The scheduler itself is left as it is. Timesteps and tables are its own; a chain of steps equals one of
    ``scheduler.step`` to 1e-6 of its size.

    Args:
        scheduler: DDIMScheduler, DDPMScheduler, PNDMScheduler or DPMSolverMultistepScheduler.
        steps: as ``scheduler.set_timesteps`` takes it; a sampler may call the network more often.
        eta: of DDIM, from 0 (no noise) to 1 (as much as DDPM).

    Raises:
        UnsupportedModelError: another scheduler, or one that takes its own steps.
        ConfigurationError: steps out of range, an option or a prediction type that the step does not know, or numbers
            with which diffusers would compute NaN.

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
    own = _with_timesteps(scheduler, name, steps)
    return DDIMSampler(own, eta) if kind is DDIMSampler else kind(own)


def _kind(scheduler: Any) -> str:
    """The supported class whose step the scheduler takes; by name, so that diffusers need not be imported."""
    found: Any = type(scheduler)
    for cls in found.__mro__:
        if cls.__name__ in SUPPORTED and cls.__module__.split(".")[0] == "diffusers":
            break
    else:
        raise UnsupportedModelError(
            f"{found.__name__} is no scheduler whose step is known; supported are {', '.join(SUPPORTED)}: "
            "write for example scheduler = DDIMScheduler.from_config(scheduler.config)."
        )
    if found.step is not cls.step:
        raise UnsupportedModelError(
            f"{found.__name__} overrides the step of {cls.__name__}, which would not be taken: write "
            f"scheduler = {cls.__name__}.from_config(scheduler.config) if the original step will do."
        )
    return str(cls.__name__)


def _check_options(scheduler: Any, name: str) -> None:
    for option, known in SUPPORTED[name].OPTIONS.items():
        found = scheduler.config.get(option, known[0])
        if found in known:
            continue
        expected = ", ".join(map(repr, known))
        advice = (
            "write the one of them that the network was trained with"
            if option == "prediction_type"
            else f"write scheduler = {name}.from_config(scheduler.config, {option}={known[0]!r})"
        )
        why = f" ({_WHY[option]})" if option in _WHY else ""
        raise ConfigurationError(f"{option}={found!r} of {name} is not supported{why}; known: {expected}: {advice}.")


def _with_timesteps(scheduler: Any, name: str, steps: int) -> Any:
    """A copy after ``set_timesteps``, which replaces what it changes: a shallow one leaves the original alone."""
    most = int(scheduler.config.num_train_timesteps)
    least = 1 if scheduler.config.get("skip_prk_steps", True) else 4
    if not least <= steps <= most:
        hint = "; or with skip_prk_steps=True from 1" if least > 1 else ""
        raise ConfigurationError(
            f"steps={steps}: expected {least} .. {most}, as many as {name} was trained with{hint}."
        )
    own = copy.copy(scheduler)
    try:
        own.set_timesteps(steps)
    except ValueError as error:
        raise ConfigurationError(f"{name} has no timesteps for steps={steps}: {error}") from error
    outside = [int(t) for t in own.timesteps if not 0 <= t < most]
    if outside:
        raise ConfigurationError(
            f"{name} with steps={steps} asks for timestep {outside[0]}, expected 0 .. {most - 1}: write fewer steps, "
            f"or a scheduler with another steps_offset (found {scheduler.config.get('steps_offset')}) or "
            f"timestep_spacing (found {scheduler.config.get('timestep_spacing')!r})."
        )
    return own
