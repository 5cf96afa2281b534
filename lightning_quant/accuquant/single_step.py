"""Single-step samplers, whose step needs x, one output and possibly noise: DDIM and DDPM.

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
    """Coefficients of x_{k+1} = original * clipped_image + direction * (x or its noise) + sigma * noise."""

    original: float
    direction: float
    sigma: float


class _SingleStepSampler(Sampler):
    """Sampler whose step is a weighted sum of the predicted image, a direction and fresh noise."""

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
        coefficients, prediction = self._steps[k], self._predictions[k]
        original = prediction.original(x, output)
        if self.clip is not None:
            original = original.clamp(-self.clip, self.clip)
        result = coefficients.original * original + coefficients.direction * self._direction(prediction, x, output)
        if self.draws(k):
            result = result + coefficients.sigma * self._noise(k, x, noise)
        return result, ()

    def draws(self, k: int) -> bool:
        return self._steps[k].sigma > 0

    @abstractmethod
    def _coefficients(self, scheduler: Any, t: int) -> _Step: ...

    @abstractmethod
    def _direction(self, prediction: Prediction, x: Tensor, output: Tensor) -> Tensor: ...


class DDIMSampler(_SingleStepSampler):
    """DDIM sampler with any eta: 0 is deterministic, 1 is as noisy as DDPM.

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
        # Not the next timestep in the list: with spacings other than "leading", diffusers uses this distance.
        previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alpha = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        sigma = self.eta * scheduler._get_variance(t, previous) ** 0.5
        step = _Step(float(alpha**0.5), float((1 - alpha - sigma**2) ** 0.5), float(sigma))
        check_finite(step, t, f"eta={self.eta} asks for more noise than the step allows: write eta=1.0 or less.")
        return step

    def _direction(self, prediction: Prediction, x: Tensor, output: Tensor) -> Tensor:
        return prediction.noise(x, output)


class DDPMSampler(_SingleStepSampler):
    """DDPM sampler (ancestral sampling); every step except the one at timestep 0 adds noise."""

    OPTIONS: ClassVar = {
        "prediction_type": PREDICTIONS,
        "thresholding": (False,),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    }
    DESCRIBED: ClassVar = ("clip_sample", "clip_sample_range", "variance_type")

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        # The choice of the previous timestep has changed between releases of diffusers.
        self._description["previous"] = [int(scheduler.previous_timestep(t)) for t in self.timesteps]

    def _coefficients(self, scheduler: Any, t: int) -> _Step:
        previous = int(scheduler.previous_timestep(t))
        alpha = scheduler.alphas_cumprod[t]
        alpha_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.one
        ratio = alpha / alpha_previous
        sigma = scheduler._get_variance(t)
        if scheduler.config.variance_type != "fixed_small_log":  # for which diffusers returns the square root already
            sigma = sigma**0.5
        step = _Step(
            float(alpha_previous**0.5 * (1 - ratio) / (1 - alpha)),
            float(ratio**0.5 * (1 - alpha_previous) / (1 - alpha)),
            float(sigma) if t > 0 else 0.0,
        )
        check_finite(step, t, "the betas of the scheduler must lie between 0 and 1.")
        return step

    def _direction(self, prediction: Prediction, x: Tensor, output: Tensor) -> Tensor:
        del prediction, output
        return x
