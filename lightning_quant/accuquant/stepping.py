"""What every sampler has: its timesteps, what it carries along, and the data prediction from a network's output.

The steps themselves are in single_step.py and multistep.py; :func:`lightning_quant.accuquant.samplers.sampler_of`
makes them from a scheduler.
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
    """The steps of one scheduler as pure functions: nothing is kept between calls, so a step can be taken again.

    A chain goes from noise to image: step k takes x_k at ``timesteps[k]`` to x_{k+1}, with one call of the network.
    Numbers that depend on the timestep alone are computed once, in FP32 from the tables of the scheduler with its own
    expressions: some cancel (1 - alpha_t / alpha_prev), so that a better precision would leave its chain by 1e-4.

    Attributes:
        timesteps: what the network is told, one for each of its calls.
        stochastic: whether some step adds noise.
        history: how many earlier outputs a step uses at most; 0 for single-step samplers.
    """

    # The values of options under which the step is the one written here, the default first.
    OPTIONS: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Options that decide what a step computes, beside the timesteps.
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
        """x_{k+1}, and what step k + 1 needs beside it.

        Differentiable in ``x``, ``output`` and every tensor of ``history``, in their dtype. Some steps leave an
        argument unused: ask ``torch.autograd.grad`` with ``allow_unused=True``.

        Args:
            k: 0 .. len(timesteps) - 1.
            x: (n, C, H, W), x_k.
            output: (n, C, H, W), what the network said of ``x`` at ``timesteps[k]``.
            history: what the step before returned, or :meth:`history_at`.
            noise: (n, C, H, W), standard normal; needed where :meth:`draws` is true, else not looked at.
        """

    def start(self) -> History:
        """What is carried along at the start of a chain: nothing."""
        return ()

    def carried(self, k: int) -> int:
        """How many tensors the history before step ``k`` has; the same in every chain."""
        del k
        return 0

    def history_at(self, k: int, states: Tensor, outputs: Tensor) -> History:
        """What a chain with these states and outputs carries along before step ``k``.

        Args:
            k: 0 .. len(timesteps).
            states: (at least k, n, C, H, W), x_0, x_1 and so on.
            outputs: (at least k, n, C, H, W), the network's outputs at them.
        """
        del k, states, outputs
        return ()

    def draws(self, k: int) -> bool:
        """Whether step ``k`` adds noise."""
        del k
        return False

    def describe(self) -> dict[str, Any]:
        """Plain values that decide what the steps compute, for fingerprints."""
        return dict(self._description)

    def _check_carried(self, k: int, history: History) -> None:
        if len(history) != self.carried(k):
            raise ConfigurationError(
                f"step({k}) carries {self.carried(k)} tensors in its history, found {len(history)}: pass what the step "
                f"before returned, start() before the first one, or history_at({k}, states, outputs)."
            )

    def _noise(self, k: int, x: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            raise ConfigurationError(
                f"step({k}) at timestep {self.timesteps[k]} adds noise, found noise=None: pass a standard normal "
                f"tensor of shape {tuple(x.shape)}, the same one to every network that is compared."
            )
        return noise.to(x)


@dataclass(frozen=True)
class Prediction:
    """What an output says at one timestep, where x = root_alpha * original + root_beta * noise.

    Attributes:
        kind: one of `PREDICTIONS`.
        root_alpha: share of the image.
        root_beta: share of the noise.
    """

    kind: str
    root_alpha: float
    root_beta: float

    def original(self, x: Tensor, output: Tensor) -> Tensor:
        """The image behind ``x``.

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
        """The noise in ``x``."""
        if self.kind == EPSILON:
            return output
        if self.kind == VELOCITY:
            return self.root_alpha * output + self.root_beta * x
        return (x - self.root_alpha * output) / self.root_beta


def prediction_at(scheduler: Any, t: int) -> Prediction:
    """How to read an output at timestep ``t`` of a scheduler with the table ``alphas_cumprod``.

    Raises:
        ConfigurationError: ``epsilon`` where nothing of the image is left in x, as with a zero terminal SNR.
    """
    alpha, kind = scheduler.alphas_cumprod[t], scheduler.config.prediction_type
    if alpha == 0 and kind == EPSILON:
        raise ConfigurationError(
            f"prediction_type='epsilon' says nothing of the image at timestep {t}, where alphas_cumprod is 0 "
            f"(rescale_betas_zero_snr={scheduler.config.get('rescale_betas_zero_snr')}): write a scheduler with "
            "rescale_betas_zero_snr=False, or use a network trained with prediction_type='v_prediction'."
        )
    return Prediction(kind, float(alpha**0.5), float((1 - alpha) ** 0.5))


def check_finite(numbers: tuple[float, ...], t: int, advice: str) -> None:
    """Refuse a step whose numbers are not finite: diffusers would go on with NaN.

    Raises:
        ConfigurationError: a number is infinite or NaN.
    """
    if not all(map(math.isfinite, numbers)):
        raise ConfigurationError(f"the step from timestep {t} has no finite coefficients, found {numbers}: {advice}")


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
    """As JSON has it: arrays and tuples as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
