"""Tiny denoisers with ranges, as a calibration has them before it learns, and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from helpers.diffusion import tiny_condition_unet, tiny_dit, tiny_inputs, tiny_unet
from lightning_quant.accuquant.blocks import Call
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.plan import DenoiserPlan, plan_denoiser
from lightning_quant.accuquant.ranges import activation_ranges, prepare, weight_ranges
from lightning_quant.accuquant.settings import Settings

NETWORKS: dict[str, Callable[[], Any]] = {"unet": tiny_unet, "condition": tiny_condition_unet, "dit": tiny_dit}
TIMES = (801, 401, 1)
GUIDANCE = 3.0


def call(denoiser: Denoiser, t: int, images: list[int], of: int = 4) -> Tensor:
    """The denoiser on some images of a timestep's, each its own wherever it is computed."""
    x, conditioning = tiny_inputs(denoiser.network, of, seed=t)
    return denoiser(x[images], t, {name: rows[images] for name, rows in conditioning.items()})


def calls_of(denoiser: Denoiser, images: list[int], of: int = 4) -> list[Call]:
    return [(partial(call, denoiser, t, images, of), t) for t in TIMES]


@cache
def _prepared(kind: str, images: int, starts: tuple[int, ...], guidance: float | None, settings: Settings) -> Any:
    denoiser = Denoiser(NETWORKS[kind](), guidance)
    calls = calls_of(denoiser, list(range(images)), images)
    with torch.no_grad():
        plan = plan_denoiser(denoiser.network, settings, calls[0][0])
    prepare(denoiser.network, plan, starts)
    activation_ranges(denoiser.network, [run for run, _ in calls])
    weight_ranges(denoiser.network)
    return denoiser.network, plan


def prepared(
    kind: str, images: int = 4, starts: tuple[int, ...] = (), guidance: float | None = None, **settings: Any
) -> tuple[Denoiser, DenoiserPlan, list[Call]]:
    """A tiny denoiser with ranges from the calls that come with it."""
    chosen = Settings(**{"weight_bits": 3, "activation_bits": 6, **settings})
    network, plan = _prepared(kind, images, starts, guidance, chosen)
    denoiser = Denoiser(deepcopy(network), guidance)
    return denoiser, plan, calls_of(denoiser, list(range(images)), images)
