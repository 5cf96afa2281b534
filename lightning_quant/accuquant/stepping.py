"""Base class of samplers, and predictions of image and noise from a network's output.

The steps themselves are in single_step.py and multistep.py; :func:`lightning_quant.accuquant.samplers.sampler_of`
builds them from a scheduler.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_quant.errors import ConfigurationError

History = tuple[Tensor, ...]

EPSILON, SAMPLE, VELOCITY = "epsilon", "sample", "v_prediction"
PREDICTIONS = (EPSILON, SAMPLE, VELOCITY)


class Sampler(ABC):
    """Steps of a scheduler as pure functions: nothing is kept between calls, so a step can be repeated.

    A chain goes from noise to image: step k takes x_k at ``timesteps[k]`` to x_{k+1}, with one call of the network.
    Coefficients, which depend on the timestep alone, are computed once, in FP32 from the scheduler's tables and with
    its own expressions: some suffer from cancellation (1 - alpha_t / alpha_prev), so that a higher precision would
    deviate from its chain by 1e-4.

    Attributes:
        timesteps: Timestep of each call of the network.
        stochastic: Whether some step adds noise.
        history: Maximum number of earlier outputs that a step uses; 0 for single-step samplers.
    """

    # Supported values of options, the default first.
    OPTIONS: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Options beside the timesteps that determine what a step computes.
    DESCRIBED: ClassVar[tuple[str, ...]] = ()

    history: int = 0
    stochastic: bool = False

    def __init__(self, scheduler: Any) -> None:
        """Take timesteps and options from a diffusers scheduler after ``set_timesteps``."""
        self.timesteps: tuple[int, ...] = tuple(int(t) for t in scheduler.timesteps)
        self._description = {
            "scheduler": type(self).__name__.replace("Sampler", "Scheduler"),
            "timesteps": list(self.timesteps),
            "steps": int(scheduler.num_inference_steps),
            **{option: _plain(scheduler.config.get(option)) for option in (*_TABLES, *self.DESCRIBED)},
        }

    @abstractmethod
    def step(
        self, k: int, x: Tensor, output: Tensor, history: History = (), noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """Return x_{k+1} and the history for step k + 1.

        Differentiable in ``x``, ``output`` and every tensor of ``history``, in their dtype. Some steps do not use all
        arguments: call ``torch.autograd.grad`` with ``allow_unused=True``.

        Args:
            k: Index of the step, 0 .. len(timesteps) - 1.
            x: State x_k, (n, C, H, W).
            output: Output of the network for ``x`` at ``timesteps[k]``, (n, C, H, W).
            history: History returned by the previous step or by :meth:`history_at`.
            noise: Standard normal noise, (n, C, H, W); required if :meth:`draws` is true, else ignored.
        """

    def start(self) -> History:
        """Return the history at the start of a chain, which is empty."""
        return ()

    def carried(self, k: int) -> int:
        """Return the number of tensors in the history before step ``k``; it is the same in every chain."""
        del k
        return 0

    def history_at(self, k: int, states: Tensor, outputs: Tensor) -> History:
        """Return the history before step ``k`` of a chain with these states and outputs.

        Args:
            k: Index of the step, 0 .. len(timesteps).
            states: States x_0, x_1, ..., (at least k, n, C, H, W).
            outputs: Outputs of the network for these states, (at least k, n, C, H, W).
        """
        del k, states, outputs
        return ()

    def draws(self, k: int) -> bool:
        """Return whether step ``k`` adds noise."""
        del k
        return False

    def describe(self) -> dict[str, Any]:
        """Return the plain values that determine what the steps compute, for fingerprints."""
        return dict(self._description)

    def _check_carried(self, k: int, history: History) -> None:
        if len(history) != self.carried(k):
            raise ConfigurationError(
                f"step({k}) expects {self.carried(k)} tensors in its history, found {len(history)}: pass the history "
                f"that the previous step returned, start() for the first step, or history_at({k}, states, outputs)."
            )

    def _noise(self, k: int, x: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            raise ConfigurationError(
                f"step({k}) at timestep {self.timesteps[k]} adds noise, found noise=None: pass a standard normal "
                f"tensor of shape {tuple(x.shape)}, the same for all networks that are compared."
            )
        return noise.to(x)


@dataclass(frozen=True)
class Prediction:
    """Interpretation of an output at one timestep, with x = root_alpha * original + root_beta * noise.

    Attributes:
        kind: Prediction type, one of `PREDICTIONS`.
        root_alpha: Factor of the image.
        root_beta: Factor of the noise.
    """

    kind: str
    root_alpha: float
    root_beta: float

    def original(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the predicted image in ``x``.

        Example:
            >>> import torch
            >>> Prediction("epsilon", 0.8, 0.6).original(torch.tensor([2.0]), torch.tensor([2.0]))
            tensor([1.0000])
        """
        if self.kind == EPSILON:
            return (x - self.root_beta * output) / self.root_alpha
        if self.kind == VELOCITY:
            return self.root_alpha * x - self.root_beta * output
        return output

    def noise(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the predicted noise in ``x``."""
        if self.kind == EPSILON:
            return output
        if self.kind == VELOCITY:
            return self.root_alpha * output + self.root_beta * x
        return (x - self.root_alpha * output) / self.root_beta


def prediction_at(scheduler: Any, t: int) -> Prediction:
    """Return the interpretation of an output at timestep ``t`` of a scheduler with the table ``alphas_cumprod``.

    Raises:
        ConfigurationError: Prediction type ``epsilon`` where x is pure noise, as with a zero terminal SNR.
    """
    alpha, kind = scheduler.alphas_cumprod[t], scheduler.config.prediction_type
    if alpha == 0 and kind == EPSILON:
        raise ConfigurationError(
            f"prediction_type='epsilon' does not determine the image at timestep {t}, where alphas_cumprod is 0 "
            f"(rescale_betas_zero_snr={scheduler.config.get('rescale_betas_zero_snr')}): write a scheduler with "
            "rescale_betas_zero_snr=False, or use a network trained with prediction_type='v_prediction'."
        )
    return Prediction(kind, float(alpha**0.5), float((1 - alpha) ** 0.5))


def check_finite(numbers: tuple[float, ...], t: int, advice: str) -> None:
    """Refuse a step whose coefficients are not finite, with which diffusers would continue and compute NaN.

    Raises:
        ConfigurationError: Coefficient that is infinite or NaN.
    """
    if not all(map(math.isfinite, numbers)):
        raise ConfigurationError(f"The step from timestep {t} has no finite coefficients, found {numbers}: {advice}")


_TABLES = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


def _plain(value: Any) -> Any:
    """Convert a value for JSON: arrays and tuples become lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
