"""Multistep samplers, whose steps also use earlier outputs: PNDM (Runge-Kutta and PLMS) and DPM-Solver++ 2M.

Sources: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds" (arXiv 2202.09778); Lu et al.,
"DPM-Solver++" (arXiv 2211.01095).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_quant.accuquant.stepping import (
    EPSILON,
    PREDICTIONS,
    VELOCITY,
    History,
    Prediction,
    Sampler,
    check_finite,
    prediction_at,
)

# Weights of the newest output and of earlier ones, and the divisor of their sum (Adams-Bashforth).
_MULTISTEP = (((1,), 1), ((3, -1), 2), ((23, -16, 5), 12), ((55, -59, 37, -9), 24))


class _Plan(NamedTuple):
    """Combination of earlier tensors in a step, which takes x_base from timestep ``start`` to ``end``.

    Attributes:
        base: Index of the state that the step starts from, which is not always the network's input.
        outputs: Indices of the outputs that are combined.
        weights: Weight of each output.
        divisor: Divisor of the weighted sum.
        start: Timestep of the base.
        end: Timestep of the result; below 0 the image.
    """

    base: int
    outputs: tuple[int, ...]
    weights: tuple[float, ...]
    divisor: int
    start: int
    end: int


class _Transfer(NamedTuple):
    """Coefficients of equation 9 of PNDM: x_end = sample * x_start - difference * noise / denominator."""

    sample: float
    difference: float
    denominator: float


class PNDMSampler(Sampler):
    """Linear multistep sampler (PLMS), after Runge-Kutta steps of four calls each unless the scheduler skips them.

    Every call of the network is a step: also the second call of PLMS, which repeats the first step from x_0 with a
    better output, and each of the four calls of Runge-Kutta. The history before step k holds the states and outputs
    that step k or a later one needs again.

    Example:
        >>> from diffusers import PNDMScheduler
        >>> from lightning_quant.accuquant.samplers import sampler_of
        >>> sampler = sampler_of(PNDMScheduler(skip_prk_steps=True), steps=5)
        >>> sampler.timesteps
        (800, 600, 600, 400, 200, 0)
        >>> [sampler.carried(k) for k in range(7)]
        [0, 2, 1, 2, 3, 3, 0]
    """

    OPTIONS: ClassVar = {"prediction_type": (EPSILON, VELOCITY)}
    DESCRIBED: ClassVar = ("skip_prk_steps", "set_alpha_to_one")

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._plans = _plans(scheduler, self.timesteps)
        self._carried = _carried(self._plans)
        self._predictions = tuple(prediction_at(scheduler, plan.start) for plan in self._plans)
        self._transfers = tuple(_transfer(scheduler, plan) for plan in self._plans)
        self.history = max(len(plan.outputs) for plan in self._plans) - 1

    def step(
        self, k: int, x: Tensor, output: Tensor, history: History = (), noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        del noise
        self._check_carried(k, history)
        plan, prediction, transfer = self._plans[k], self._predictions[k], self._transfers[k]
        tensors = {**dict(zip(self._carried[k], history, strict=True)), ("state", k): x, ("output", k): output}
        base = tensors["state", plan.base]
        combined = plan.weights[0] * tensors["output", plan.outputs[0]]
        for index, weight in zip(plan.outputs[1:], plan.weights[1:], strict=True):
            combined = combined + weight * tensors["output", index]
        epsilon = prediction.noise(base, combined / plan.divisor)
        result = transfer.sample * base - transfer.difference * epsilon / transfer.denominator
        return result, tuple(tensors[name] for name in self._carried[k + 1])

    def carried(self, k: int) -> int:
        return len(self._carried[k])

    def history_at(self, k: int, states: Tensor, outputs: Tensor) -> History:
        return tuple((states if kind == "state" else outputs)[index] for kind, index in self._carried[k])


class _Update(NamedTuple):
    """Coefficients of x_{k+1} = ratio * x - first * data - second * slope, slope = (data - previous data) * inverse."""

    ratio: float
    first: float
    second: float
    inverse: float


class DPMSolverSampler(Sampler):
    """DPM-Solver++ sampler of order 1, or of order 2 with the previous prediction of the image (2M), midpoint or Heun.

    The history before a step of order 2 is the previous prediction of the image; before other steps it is empty.
    """

    OPTIONS: ClassVar = {
        "prediction_type": PREDICTIONS,
        "thresholding": (False,),
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2, 1),
        "solver_type": ("midpoint", "heun"),
        "variance_type": (None,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    }
    DESCRIBED: ClassVar = (
        *("solver_order", "solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    )

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        alpha = 1 / (scheduler.sigmas**2 + 1) ** 0.5
        sigma = scheduler.sigmas * alpha
        kind = scheduler.config.prediction_type
        self._predictions = tuple(Prediction(kind, float(a), float(s)) for a, s in zip(alpha, sigma, strict=True))
        self._second = tuple(_second_order(scheduler.config, k, len(self.timesteps)) for k in range(len(alpha)))
        self._updates = tuple(
            _update(alpha, sigma, k, self._second[k] and scheduler.config.solver_type) for k in range(len(alpha) - 1)
        )
        for update, t in zip(self._updates, self.timesteps, strict=True):
            check_finite(update, t, "two steps in a row have the same sigma: write fewer steps.")
        self.history = int(any(self._second))

    def step(
        self, k: int, x: Tensor, output: Tensor, history: History = (), noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        del noise
        self._check_carried(k, history)
        update, data = self._updates[k], self._predictions[k].original(x, output)
        result = update.ratio * x - update.first * data
        for previous in history:
            result = result - update.second * (update.inverse * (data - previous))
        return result, (data,) * self.carried(k + 1)

    def carried(self, k: int) -> int:
        return int(self._second[k])

    def history_at(self, k: int, states: Tensor, outputs: Tensor) -> History:
        if not self._second[k]:
            return ()
        return (self._predictions[k - 1].original(states[k - 1], outputs[k - 1]),)


def _plans(scheduler: Any, timesteps: tuple[int, ...]) -> tuple[_Plan, ...]:
    """Return the combination of tensors and the start and end timesteps of each step."""
    distance = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if scheduler.config.skip_prk_steps:
        plans = [_Plan(0, (0,), (1,), 1, timesteps[0], timesteps[0] - distance)]
        if len(timesteps) > 1:
            plans.append(_Plan(0, (1, 0), (1, 1), 2, timesteps[1] + distance, timesteps[1]))
        used = [0]
    else:
        plans = _runge_kutta(timesteps[: len(scheduler.prk_timesteps)], distance // 2)
        used = [*range(0, len(plans), 4)]
    for k in range(len(plans), len(timesteps)):
        used = [*used[-3:], k]
        weights, divisor = _MULTISTEP[len(used) - 1]
        plans.append(_Plan(k, tuple(used[::-1]), weights, divisor, timesteps[k], timesteps[k] - distance))
    return tuple(plans)


def _runge_kutta(timesteps: tuple[int, ...], half: int) -> list[_Plan]:
    plans = []
    for k, t in enumerate(timesteps):
        first = k // 4 * 4
        # Sixths before the sum, as in diffusers: the cosine schedule's first step amplifies rounding errors by 2000.
        outputs, weights = ((k,), (1.0,)) if k < first + 3 else (range(first, k + 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
        plans.append(_Plan(first, tuple(outputs), weights, 1, timesteps[first], t if k % 2 else t - half))
    return plans


def _carried(plans: tuple[_Plan, ...]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Return the earlier states and outputs that are needed again before each step and after the last."""
    needed = [{("state", plan.base), *(("output", index) for index in plan.outputs)} for plan in plans]
    return tuple(
        tuple(sorted({name for names in needed[k:] for name in names if name[1] < k})) for k in range(len(plans) + 1)
    )


def _transfer(scheduler: Any, plan: _Plan) -> _Transfer:
    start = scheduler.alphas_cumprod[plan.start]
    end = scheduler.alphas_cumprod[plan.end] if plan.end >= 0 else scheduler.final_alpha_cumprod
    transfer = _Transfer(
        float((end / start) ** 0.5),
        float(end - start),
        float(start * (1 - end) ** 0.5 + (start * (1 - start) * end) ** 0.5),
    )
    check_finite(transfer, plan.start, "the betas of the scheduler must lie between 0 and 1.")
    return transfer


def _second_order(config: Any, k: int, steps: int) -> bool:
    """Return whether step ``k`` is of order 2; the last one is not if diffusers lowers its order."""
    lowered = config.euler_at_final or (config.lower_order_final and steps < 15) or config.final_sigmas_type == "zero"
    return config.solver_order == 2 and 0 < k < steps - bool(lowered)


def _update(alpha: Tensor, sigma: Tensor, k: int, second_order: str | bool) -> _Update:
    """Return the coefficients of step ``k``; ``second_order`` is the solver type of a step of order 2, else False."""
    log_snr = torch.log(alpha) - torch.log(sigma)
    h = log_snr[k + 1] - log_snr[k]
    first = alpha[k + 1] * (torch.exp(-h) - 1.0)
    second, inverse = 0.0, 0.0
    if second_order:
        heun = -alpha[k + 1] * ((torch.exp(-h) - 1.0) / h + 1.0)
        second = float(heun if second_order == "heun" else 0.5 * first)
        inverse = float(1.0 / ((log_snr[k] - log_snr[k - 1]) / h))
    return _Update(float(sigma[k + 1] / sigma[k]), float(first), second, inverse)
