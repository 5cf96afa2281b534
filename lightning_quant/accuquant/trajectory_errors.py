"""How far a quantized denoiser leaves the float trajectories, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.samplers import Sampler
from lightning_quant.accuquant.trajectories import Trajectories, device_of
from lightning_quant.accuquant.windows import roll
from lightning_quant.nn.evaluation import evaluating
from lightning_quant.quantizers.statistics import all_reduce_sum


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
