"""Samplers whose step needs x, one output and perhaps noise: DDIM and DDPM.

Sources: Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502); Ho et al., "Denoising Diffusion
Probabilistic Models" (arXiv 2006.11239).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_quant.accuquant.stepping import (
    PREDICTIONS,
    History,
    Prediction,
    Sampler,
    check_finite,
    prediction_at,
)


class _Step(NamedTuple):
    """x_{k+1} = original * (clipped prediction of the image) + direction * (x or the noise in it) + sigma * noise."""

    original: float
    direction: float
    sigma: float


class _SingleStepSampler(Sampler):
    """A weighted sum of the predicted image, a direction, and fresh noise."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.clip: float | None = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        self._predictions = tuple(prediction_at(scheduler, t) for t in self.timesteps)
        self._steps = tuple(self._coefficients(scheduler, t) for t in self.timesteps)
        self.stochastic = any(step.sigma > 0 for step in self._steps)

    def step(
        self, k: int, x: Tensor, output: Tensor, history: History = (), noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        self._check_carried(k, history)
        at, says = self._steps[k], self._predictions[k]
        original = says.original(x, output)
        if self.clip is not None:
            original = original.clamp(-self.clip, self.clip)
        result = at.original * original + at.direction * self._direction(says, x, output)
        if self.draws(k):
            result = result + at.sigma * self._noise(k, x, noise)
        return result, ()

    def draws(self, k: int) -> bool:
        return self._steps[k].sigma > 0

    @abstractmethod
    def _coefficients(self, scheduler: Any, t: int) -> _Step: ...

    @abstractmethod
    def _direction(self, says: Prediction, x: Tensor, output: Tensor) -> Tensor: ...


class DDIMSampler(_SingleStepSampler):
    """DDIM with any eta: 0 adds no noise, 1 as much as DDPM.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from lightning_quant.accuquant.samplers import sampler_of
        >>> sampler = sampler_of(DDIMScheduler(clip_sample=False), steps=4)
        >>> sampler.timesteps
        (750, 500, 250, 0)
        >>> x, noise = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
        >>> x_next, history = sampler.step(0, x, noise)
        >>> round(float(x_next.mean()), 4), history
        (-3.8869, ())
    """

    OPTIONS: ClassVar = {"prediction_type": PREDICTIONS, "thresholding": (False,)}
    DESCRIBED: ClassVar = ("clip_sample", "clip_sample_range", "set_alpha_to_one")

    def __init__(self, scheduler: Any, eta: float = 0.0) -> None:
        self.eta = eta
        super().__init__(scheduler)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "eta": self.eta}

    def _coefficients(self, scheduler: Any, t: int) -> _Step:
        # Not the next timestep of the list: with spacings other than "leading" diffusers goes by this distance.
        previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alpha = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        sigma = self.eta * scheduler._get_variance(t, previous) ** 0.5
        step = _Step(float(alpha**0.5), float((1 - alpha - sigma**2) ** 0.5), float(sigma))
        check_finite(step, t, f"eta={self.eta} asks for more noise than the step can hold: write eta=1.0 or less.")
        return step

    def _direction(self, says: Prediction, x: Tensor, output: Tensor) -> Tensor:
        return says.noise(x, output)


class DDPMSampler(_SingleStepSampler):
    """Ancestral sampling; every step but the one at timestep 0 adds noise."""

    OPTIONS: ClassVar = {
        "prediction_type": PREDICTIONS,
        "thresholding": (False,),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    }
    DESCRIBED: ClassVar = ("clip_sample", "clip_sample_range", "variance_type")

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        # Which one precedes is the library's choice, and has changed between its releases.
        self._description["previous"] = [int(scheduler.previous_timestep(t)) for t in self.timesteps]

    def _coefficients(self, scheduler: Any, t: int) -> _Step:
        previous = int(scheduler.previous_timestep(t))
        alpha = scheduler.alphas_cumprod[t]
        alpha_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.one
        ratio = alpha / alpha_previous
        sigma = scheduler._get_variance(t)
        if scheduler.config.variance_type != "fixed_small_log":  # which is no variance, but its root
            sigma = sigma**0.5
        step = _Step(
            float(alpha_previous**0.5 * (1 - ratio) / (1 - alpha)),
            float(ratio**0.5 * (1 - alpha_previous) / (1 - alpha)),
            float(sigma) if t > 0 else 0.0,
        )
        check_finite(step, t, "the betas of the scheduler must lie between 0 and 1.")
        return step

    def _direction(self, says: Prediction, x: Tensor, output: Tensor) -> Tensor:
        del says, output
        return x
