"""What a calibration works on: a prepared denoiser and float trajectories, and how far it is from them."""

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

# Of the float trajectories, how many images and network calls ranges and blocks see.
RANGE_IMAGES, RANGE_CALLS = 16, 20


@dataclass(frozen=True)
class Source:
    """What a calibration works on.

    Attributes:
        denoiser: around the prepared network, quantizers in all slots.
        sampler: its steps.
        plan: what is quantized.
        cache: of float trajectories, which holds all images below.
        images: numbers of those to learn from.
        held_out: numbers of those that decide when to stop.
        rank: of this process, among ``ranks``.
        ranks: how many share the images.
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
        """The denoiser's."""
        return self.denoiser.network

    @property
    def settings(self) -> Settings:
        """The plan's."""
        return self.plan.settings

    @property
    def steps(self) -> int:
        """Network calls of a trajectory: of PLMS one more than its steps."""
        return len(self.sampler.timesteps)

    @property
    def branches(self) -> int:
        """Rows of the network for each image: two with guidance."""
        return 1 if self.denoiser.guidance is None else 2

    def share(self, ids: list[int]) -> list[int]:
        """This rank's of some images."""
        return ids[self.rank :: self.ranks]

    def window(self, ids: list[int], steps: range) -> Trajectories:
        """The float trajectories over some steps, on the network's device."""
        return self.cache.window(ids, steps.start, steps.stop).to(device_of(self.network, torch.device("cpu")))

    # -- calls of the network -----------------------------------------------------------------------------------------

    @property
    def steps_to_see(self) -> list[int]:
        """Steps at which ranges are taken: evenly spread; all where each group of steps has its own."""
        if self.settings.activation_parameters == "per_group":
            return list(range(self.steps))
        return sorted({round(k) for k in torch.linspace(0, self.steps - 1, min(RANGE_CALLS, self.steps)).tolist()})

    def calls(self, steps: list[int]) -> list[Callable[[], object]]:
        """Calls of the network on float states, one for each of some steps; none where this rank has no image."""
        ids = self.share(list(self.images)[:RANGE_IMAGES])
        return [partial(self._call, ids, k) for k in steps] if ids else []

    def _call(self, ids: list[int], k: int) -> Tensor:
        some = self.window(ids, range(k, k + 1))
        return self.denoiser(some.states[0], self.sampler.timesteps[k], some.conditioning)

    # -- losses and errors --------------------------------------------------------------------------------------------

    def window_loss(self, ids: list[int], steps: range, total: int) -> Tensor:
        """This rank's share of the loss of a window, of ``total`` images over all ranks."""
        some = self.window(ids, steps)
        denoise = partial(_denoise, self.denoiser, some)
        window = replace(some.to_window(), total=total)
        if self.settings.start == "prefix" and steps.start:
            window = self._after_prefix(window, ids)
        return window_loss(denoise, self.sampler, window, self.settings.adjoint)

    def _after_prefix(self, window: Window, ids: list[int]) -> Window:
        """The window from the state that the quantized model itself reaches."""
        before = self.window(ids, range(window.start))
        rollout = roll(partial(_denoise, self.denoiser, before), self.sampler, before.to_window())
        histories = (rollout.histories[-1], *window.histories[1:])
        return replace(window, x=rollout.states[-1], histories=histories)

    def held_out_errors(self) -> Tensor:
        """RMSE to the held-out float trajectories after each step, (steps + 1,), over all ranks."""
        return accumulated_errors(self.denoiser, self.sampler, self._held_out())

    def held_out_single_steps(self) -> Tensor:
        """RMSE of each step from the held-out float states, (steps,), over all ranks."""
        return single_step_errors(self.denoiser, self.sampler, self._held_out())

    def _held_out(self) -> Trajectories | None:
        ids = self.share(list(self.held_out))
        return self.cache.trajectories(ids) if ids else None


def _denoise(denoiser: Denoiser, some: Trajectories, x: Tensor, t: int) -> Tensor:
    return denoiser(x, t, some.conditioning)


def accumulated_errors(denoiser: Denoiser, sampler: Sampler, trajectories: Trajectories | None) -> Tensor:
    """RMSE to the float states when the quantized denoiser walks all the way from the same noise, (steps + 1,).

    Args:
        denoiser: around the quantized network.
        sampler: that the trajectories are of.
        trajectories: this rank's, float, with all steps; None where a rank has none.
    """
    device = device_of(denoiser.network, torch.device("cpu"))
    if trajectories is None:
        return _over_ranks([torch.zeros((), device=device)] * (len(sampler.timesteps) + 1), 0)
    some = trajectories.to(device)
    with evaluating(denoiser.network):
        rollout = roll(lambda x, t: denoiser(x, t, some.conditioning), sampler, some.to_window())
    squares = [(x - y).double().square().sum() for x, y in zip(rollout.states, some.states, strict=True)]
    return _over_ranks(squares, some.states[0].numel())


def single_step_errors(denoiser: Denoiser, sampler: Sampler, trajectories: Trajectories | None) -> Tensor:
    """RMSE to the next float state of each step that starts at the float state, (steps,); as above."""
    device = device_of(denoiser.network, torch.device("cpu"))
    if trajectories is None:
        return _over_ranks([torch.zeros((), device=device)] * len(sampler.timesteps), 0)
    some, squares = trajectories.to(device), []
    window = some.window(0, len(sampler.timesteps), sampler).to_window()
    with evaluating(denoiser.network):
        for step in range(len(window)):
            single = window.single(step)
            reached = roll(lambda x, t: denoiser(x, t, some.conditioning), sampler, single).states[-1]
            squares.append((reached - single.states[-1]).double().square().sum())
    return _over_ranks(squares, some.states[0].numel())


def _over_ranks(squares: Sequence[Tensor], count: int) -> Tensor:
    sums = torch.stack([*(square.double() for square in squares), squares[0].new_tensor(count).double()])
    *totals, number = all_reduce_sum(sums)
    errors: Tensor = (torch.stack(totals) / number).sqrt()
    return errors.float().cpu()
