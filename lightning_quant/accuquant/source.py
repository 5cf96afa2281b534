"""Source of a calibration: a prepared denoiser, float trajectories, and the error between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.plan import DenoiserPlan
from lightning_quant.accuquant.samplers import Sampler
from lightning_quant.accuquant.settings import Settings
from lightning_quant.accuquant.trajectories import Trajectories, device_of
from lightning_quant.accuquant.trajectory_cache import TrajectoryCache
from lightning_quant.accuquant.windows import Window, roll, window_loss
from lightning_quant.nn.modes import evaluating
from lightning_quant.utilities.distributed import all_reduce_sum

# Number of images and of network calls from the float trajectories that ranges and blocks use.
RANGE_IMAGES, RANGE_CALLS = 16, 20


@dataclass(frozen=True)
class Source:
    """Denoiser, sampler and float trajectories of a calibration.

    Attributes:
        denoiser: Denoiser around the prepared network, with quantizers in all slots.
        sampler: Sampler of the trajectories.
        plan: Plan of the quantization.
        cache: Cache of the float trajectories of all images below.
        images: Numbers of the images to learn from.
        held_out: Numbers of the images that decide when to stop.
        rank: Rank of this process.
        ranks: Number of ranks that share the images.
    """

    denoiser: Denoiser
    sampler: Sampler
    plan: DenoiserPlan
    cache: TrajectoryCache
    images: range
    held_out: range
    rank: int = 0
    ranks: int = 1

    @property
    def network(self) -> nn.Module:
        """Network of the denoiser."""
        return self.denoiser.network

    @property
    def settings(self) -> Settings:
        """Settings of the plan."""
        return self.plan.settings

    @property
    def steps(self) -> int:
        """Number of network calls in a trajectory; PLMS has one more than steps."""
        return len(self.sampler.timesteps)

    @property
    def branches(self) -> int:
        """Number of rows per image in the network's batch: 2 with guidance."""
        return 1 if self.denoiser.guidance is None else 2

    def share(self, ids: list[int]) -> list[int]:
        """Return this rank's share of some images."""
        return ids[self.rank :: self.ranks]

    def window(self, ids: list[int], steps: range) -> Trajectories:
        """Read the float trajectories over some steps, on the network's device."""
        return self.cache.window(ids, steps.start, steps.stop).to(device_of(self.network, torch.device("cpu")))

    # -- calls of the network -----------------------------------------------------------------------------------------

    @property
    def steps_to_see(self) -> list[int]:
        """Evenly spaced steps for the ranges; all steps if each group of steps has its own ranges."""
        if self.settings.activation_parameters == "per_group":
            return list(range(self.steps))
        return sorted({round(k) for k in torch.linspace(0, self.steps - 1, min(RANGE_CALLS, self.steps)).tolist()})

    def calls(self, steps: list[int]) -> list[Callable[[], object]]:
        """Return calls of the network on float states, one per step; none if this rank has no images."""
        ids = self.share(list(self.images)[:RANGE_IMAGES])
        return [partial(self._call, ids, k) for k in steps] if ids else []

    def _call(self, ids: list[int], k: int) -> Tensor:
        step = self.window(ids, range(k, k + 1))
        return self.denoiser(step.states[0], self.sampler.timesteps[k], step.conditioning)

    # -- losses and errors --------------------------------------------------------------------------------------------

    def window_loss(self, ids: list[int], steps: range, total: int) -> Tensor:
        """Return this rank's share of the loss of a window, for ``total`` images over all ranks."""
        trajectories = self.window(ids, steps)
        denoise = partial(_denoise, self.denoiser, trajectories)
        window = replace(trajectories.to_window(), total=total)
        if self.settings.start == "prefix" and steps.start:
            window = self._after_prefix(window, ids)
        return window_loss(denoise, self.sampler, window, self.settings.adjoint)

    def _after_prefix(self, window: Window, ids: list[int]) -> Window:
        """Return the window with the state that the quantized model itself reaches as its first state."""
        prefix = self.window(ids, range(window.start))
        rollout = roll(partial(_denoise, self.denoiser, prefix), self.sampler, prefix.to_window())
        histories = (rollout.histories[-1], *window.histories[1:])
        return replace(window, x=rollout.states[-1], histories=histories)

    def held_out_errors(self) -> Tensor:
        """Return the RMSE to the held-out float trajectories after each step, (steps + 1,), over all ranks."""
        return accumulated_errors(self.denoiser, self.sampler, self._held_out())

    def held_out_single_steps(self) -> Tensor:
        """Return the RMSE of each step from the held-out float states, (steps,), over all ranks."""
        return single_step_errors(self.denoiser, self.sampler, self._held_out())

    def _held_out(self) -> Trajectories | None:
        ids = self.share(list(self.held_out))
        return self.cache.trajectories(ids) if ids else None


def _denoise(denoiser: Denoiser, trajectories: Trajectories, x: Tensor, t: int) -> Tensor:
    return denoiser(x, t, trajectories.conditioning)


def accumulated_errors(denoiser: Denoiser, sampler: Sampler, trajectories: Trajectories | None) -> Tensor:
    """Return the RMSE to the float states of the quantized denoiser's trajectory from the same noise, (steps + 1,).

    Args:
        denoiser: Denoiser around the quantized network.
        sampler: Sampler of the trajectories.
        trajectories: Float trajectories of this rank, with all steps; None if the rank has no images.
    """
    device = device_of(denoiser.network, torch.device("cpu"))
    if trajectories is None:
        return _over_ranks([torch.zeros((), device=device)] * (len(sampler.timesteps) + 1), 0)
    reference = trajectories.to(device)
    with evaluating(denoiser.network):
        rollout = roll(lambda x, t: denoiser(x, t, reference.conditioning), sampler, reference.to_window())
    squares = [(x - y).double().square().sum() for x, y in zip(rollout.states, reference.states, strict=True)]
    return _over_ranks(squares, reference.states[0].numel())


def single_step_errors(denoiser: Denoiser, sampler: Sampler, trajectories: Trajectories | None) -> Tensor:
    """Return the RMSE of single steps from the float states to the next float states, (steps,).

    Args:
        denoiser: Denoiser around the quantized network.
        sampler: Sampler of the trajectories.
        trajectories: Float trajectories of this rank, with all steps; None if the rank has no images.
    """
    device = device_of(denoiser.network, torch.device("cpu"))
    if trajectories is None:
        return _over_ranks([torch.zeros((), device=device)] * len(sampler.timesteps), 0)
    reference, squares = trajectories.to(device), []
    window = reference.window(0, len(sampler.timesteps), sampler).to_window()
    with evaluating(denoiser.network):
        for step in range(len(window)):
            single = window.single(step)
            state = roll(lambda x, t: denoiser(x, t, reference.conditioning), sampler, single).states[-1]
            squares.append((state - single.states[-1]).double().square().sum())
    return _over_ranks(squares, reference.states[0].numel())


def _over_ranks(squares: Sequence[Tensor], count: int) -> Tensor:
    sums = torch.stack([*(square.double() for square in squares), squares[0].new_tensor(count).double()])
    *totals, number = all_reduce_sum(sums)
    errors: Tensor = (torch.stack(totals) / number).sqrt()
    return errors.float().cpu()
