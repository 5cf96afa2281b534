"""A denoiser that is quick and the same in every batch, and samplers to roll it out with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor, nn

from lightning_quant.accuquant.samplers import Sampler, sampler_of

SHAPE = (2, 4, 4)
KINDS = ("ddim", "ddim_eta", "ddpm", "plms", "prk", "dpm")


class Network(nn.Module):
    """Elementwise, so that a row does not depend on the others in any bit; in training mode it is off by far."""

    def __init__(self, weight: float = 0.8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        shift = 0.0 if labels is None else labels.view(-1, 1, 1, 1) * 0.1
        found: Tensor = self.dropout(self.weight * x + shift) * (0.5 + t / 2000)
        return found


class FakeDenoiser:
    """What is relied on of ``accuquant.denoiser.Denoiser``, and the batches that it got."""

    def __init__(self, weight: float = 0.8, guidance: float | None = None, broken: int | None = None) -> None:
        self.network, self.guidance, self.broken = Network(weight), guidance, broken
        self.timesteps: list[int] = []
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: int, conditioning: dict[str, Tensor]) -> Tensor:
        self.timesteps.append(t)
        self.batches.append(len(x))
        output: Tensor = self.network(x, t, conditioning.get("class_labels"))
        if t == self.broken:
            output[-1, 0, 0, 0] = torch.nan
        return output


def fake(**arguments: Any) -> Any:
    """Untyped, in the place of a denoiser."""
    return FakeDenoiser(**arguments)


def sampler(kind: str = "ddim", steps: int = 6, **options: Any) -> Sampler:
    """One of ``KINDS``."""
    match kind:
        case "ddim" | "ddim_eta":
            return sampler_of(DDIMScheduler(**options), steps, eta=0.5 if kind == "ddim_eta" else 0.0)
        case "ddpm":
            return sampler_of(DDPMScheduler(**options), steps)
        case "plms" | "prk":
            return sampler_of(PNDMScheduler(skip_prk_steps=kind == "plms", **options), steps)
    return sampler_of(DPMSolverMultistepScheduler(**options), steps)
