"""How far a quantized denoiser leaves the float trajectories, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.samplers import Sampler
from lightning_quant.accuquant.trajectories import Trajectories, device_of, evaluating
from lightning_quant.accuquant.windows import roll
from lightning_quant.quantizers.statistics import all_reduce_sum


def accumulated_errors(
    denoiser: Denoiser, sampler: Sampler, trajectories: Trajectories | None, device: torch.device | None = None
) -> Tensor:
    """RMSE to the float states when the quantized denoiser walks all the way from the same noise, (steps + 1,).

    Args:
        denoiser: around the quantized network.
        sampler: that the trajectories are of.
        trajectories: this rank's, float, with all steps; None where a rank has none.
        device: where ranks exchange tensors; default the network's.
    """
    found = device or device_of(denoiser.network, torch.device("cpu"))
    sums = torch.zeros(len(sampler.timesteps) + 2, dtype=torch.float64, device=found)
    if trajectories is not None:
        some = trajectories.to(found)
        with evaluating(denoiser.network):
            rollout = roll(lambda x, t: denoiser(x, t, some.conditioning), sampler, some.to_window())
        errors = [(x - y).double().square().sum() for x, y in zip(rollout.states, some.states, strict=True)]
        sums = torch.stack([*errors, sums.new_tensor(float(some.states[0].numel()))])
    *squares, count = all_reduce_sum(sums)
    return (torch.stack(squares) / count).sqrt().float().cpu()


def single_step_errors(denoiser: Denoiser, sampler: Sampler, trajectories: Trajectories) -> Tensor:
    """RMSE to the next float state of each step taken from the float state, (steps,)."""
    window = trajectories.to_window()
    denoise = lambda x, t: denoiser(x, t, trajectories.conditioning)  # noqa: E731
    with evaluating(denoiser.network):
        errors = []
        for step in range(len(window)):
            single = window.single(step)
            errors.append((roll(denoise, sampler, single).states[-1] - single.states[-1]).square().mean().sqrt())
    return torch.stack(errors).cpu()
