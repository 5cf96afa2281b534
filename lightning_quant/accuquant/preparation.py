"""From a float denoiser and its scheduler to a calibration that can start: plan, estimate, trajectories, quantizers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_quant.accuquant.calibration import Calibration
from lightning_quant.accuquant.denoiser import Conditioning, Denoiser, check_call
from lightning_quant.accuquant.plan import DenoiserPlan, plan_denoiser
from lightning_quant.accuquant.ranges import prepare
from lightning_quant.accuquant.reconstruction import BATCH as BLOCK_BATCH
from lightning_quant.accuquant.samplers import Sampler, sampler_of
from lightning_quant.accuquant.settings import Settings, usual_window, windows_of
from lightning_quant.accuquant.source import Source
from lightning_quant.accuquant.trajectories import check_finite, device_of, rows_to, trajectory_bytes
from lightning_quant.accuquant.trajectory_cache import TrajectoryCache
from lightning_quant.accuquant.trajectory_files import describe
from lightning_quant.accuquant.windows import network_calls
from lightning_quant.calibration.state_file import cache_folder
from lightning_quant.data.noise import initial_noise
from lightning_quant.errors import ConfigurationError
from lightning_quant.nn.agreement import check_weights_agree
from lightning_quant.nn.modes import evaluating
from lightning_quant.nn.structure import strip
from lightning_quant.utilities.progress import ProgressBar
from lightning_quant.utilities.text import duration

# Measured in forwards of the float network (benchmarks/accuquant_adjoints.py): of a quantized forward, and of one with
# its backward.
FORWARD, BACKWARD = 2.2, 5.0


@dataclass(frozen=True)
class Parts:
    """What a diffusion model is made of, as a calibration sees it.

    Attributes:
        denoiser: around the network, with guidance.
        scheduler: of diffusers.
        shape: (C, H, W) of a state.
        conditioning: rows for the images of some numbers.
    """

    denoiser: Denoiser
    scheduler: Any
    shape: tuple[int, ...]
    conditioning: Callable[[Sequence[int]], Conditioning] = lambda ids: {}


def image_numbers(settings: Settings) -> tuple[range, range]:
    """Numbers of the images to learn from, and of those held out."""
    first = range(settings.trajectories)
    return first, range(first.stop, first.stop + settings.held_out)


def sampler_for(parts: Parts, settings: Settings) -> Sampler:
    """The sampler of the settings.

    Raises:
        UnsupportedModelError: a scheduler that is not known.
        ConfigurationError: a window that is longer than the trajectory.
    """
    sampler = sampler_of(parts.scheduler, settings.steps, settings.eta)
    if isinstance(settings.window, int) and settings.window > len(sampler.timesteps):
        raise ConfigurationError(
            f"window={settings.window} is longer than the trajectory, of {len(sampler.timesteps)} steps."
        )
    return sampler


def start(trainer: pl.Trainer, parts: Parts, settings: Settings, cache_dir: Path | None) -> Calibration:
    """Print plan and estimate, make the float trajectories, and put empty quantizers into the network.

    Args:
        trainer: says where files go and how ranks share the work.
        parts: of the model, its network in float or quantized before, which is undone.
        settings: of the calibration.
        cache_dir: folder of the float trajectories; None is ``accuquant`` in ``default_root_dir``.

    Raises:
        ConfigurationError, UnsupportedModelError, CheckpointError, QuantizationError: as the parts below say.
    """
    network = parts.denoiser.network
    strip(network)
    check_weights_agree(network)
    sampler = sampler_for(parts, settings)
    learned, held = image_numbers(settings)
    with evaluating(network):
        plan = plan_denoiser(network, settings, lambda: call_once(parts, sampler, 1))
        seconds = _timed(parts, sampler, settings)
    rank_zero_info(f"{plan}\n{estimate(plan, sampler, parts.shape, seconds, trainer.world_size)}")
    cache = trajectories(trainer, parts, sampler, settings, cache_dir, range(learned.start, held.stop))
    length = settings.window if isinstance(settings.window, int) else usual_window(len(sampler.timesteps))
    groups = windows_of(len(sampler.timesteps), length) if settings.activation_parameters == "per_group" else []
    starts = [sampler.timesteps[group.start] for group in groups]
    prepare(network, plan, sorted(set(starts), reverse=True))
    source = Source(parts.denoiser, sampler, plan, cache, learned, held, trainer.global_rank, trainer.world_size)
    return Calibration(source)


def trajectories(
    trainer: pl.Trainer,
    parts: Parts,
    sampler: Sampler,
    settings: Settings,
    cache_dir: Path | None,
    ids: range,
) -> TrajectoryCache:
    """The float trajectories of some images, made where they are not there yet; the network has to be in float.

    A folder that was given holds those of one model and sampler; in the Trainer's each has a folder of its own, so that
    a module that was trained on begins anew.
    """
    folder = cache_folder(trainer, cache_dir, "accuquant") / "trajectories"
    if cache_dir is None:
        described = json.dumps(describe(parts.denoiser, sampler, parts.shape, settings.seed), sort_keys=True)
        folder /= hashlib.sha256(described.encode()).hexdigest()[:12]
    cache = TrajectoryCache(folder, chunk=min(32, len(ids)))
    share = -(-len(ids) // trainer.world_size)
    with ProgressBar(trainer, share * len(sampler.timesteps), "Float trajectories") as bar:
        conditioning = parts.conditioning(ids)
        cache.ensure(parts.denoiser, sampler, conditioning, ids, parts.shape, settings.seed, bar.update)
    return cache


def call_once(parts: Parts, sampler: Sampler, images: int) -> Tensor:
    """The float denoiser at the first step.

    Raises:
        ConfigurationError: it cannot be called so.
        QuantizationError: NaN in its output.
    """
    device = device_of(parts.denoiser.network, torch.device("cpu"))
    x = initial_noise(parts.shape, range(images), 0).to(device)
    rows = rows_to(parts.conditioning(range(images)), device)
    output = check_call(parts.denoiser, x, sampler.timesteps[0], rows)
    check_finite(output, 0, sampler.timesteps[0], range(images))
    return output


@torch.no_grad()
def _timed(parts: Parts, sampler: Sampler, settings: Settings) -> float:
    """Seconds that the float denoiser takes for a batch."""
    begin = time.perf_counter()
    call_once(parts, sampler, settings.batch_size)
    return time.perf_counter() - begin


def estimate(plan: DenoiserPlan, sampler: Sampler, shape: tuple[int, ...], seconds: float, ranks: int = 1) -> str:
    """Sentences on time, memory and disk.

    Args:
        plan: of the denoiser.
        sampler: its steps.
        shape: (C, H, W) of a state.
        seconds: that a float call of one batch took.
        ranks: that share the work.
    """
    settings, steps = plan.settings, len(sampler.timesteps)
    length = settings.window if isinstance(settings.window, int) else usual_window(steps)
    images = settings.trajectories + settings.held_out
    float_calls = images / settings.batch_size * steps
    walked = network_calls(settings.adjoint, length) - length
    update = walked * FORWARD + length * BACKWARD
    # Two more of single steps.
    checks = (settings.updates / settings.check_every + 3) * settings.held_out / settings.batch_size * steps * FORWARD
    learning = settings.updates * update * (1.25 if settings.window == "sweep" else 1) + checks
    # All blocks together are about the network.
    blocks = settings.reconstruction * BLOCK_BATCH / settings.batch_size * BACKWARD
    size = trajectory_bytes(images, steps, shape, sampler.history)
    times = [duration(calls * seconds / ranks) for calls in (float_calls, learning, blocks)]
    kept = length if settings.adjoint == "bptt" else 1
    before = f" {settings.reconstruction} iterations on each block, {times[2]};" if settings.reconstruction else ""
    return (
        f"Calibration over windows of {'a length that is searched, about ' * (settings.window == 'sweep')}{length} of"
        f" {steps} steps, {settings.adjoint} gradient: float trajectories of {images} images, {times[0]} and"
        f" {size / 1e6:.1f} MB on disk, where they are not there yet;{before} {settings.updates} updates of"
        f" {settings.batch_size} images, {times[1]}, in the memory of {kept} network call{'s' * (kept > 1)} with its"
        " gradients."
    )
