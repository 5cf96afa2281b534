"""Preparation of a calibration: plan, estimate, float trajectories and quantizers."""

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

# Cost of a quantized forward, and of one with its backward, in forwards of the float network; measured with
# benchmarks/accuquant_adjoints.py.
FORWARD, BACKWARD = 2.2, 5.0


@dataclass(frozen=True)
class Parts:
    """Parts of a diffusion model that a calibration needs.

    Attributes:
        denoiser: Denoiser around the network, with guidance.
        scheduler: Scheduler of diffusers.
        shape: Shape (C, H, W) of a state.
        conditioning: Function from image numbers to the conditioning of these images.
    """

    denoiser: Denoiser
    scheduler: Any
    shape: tuple[int, ...]
    conditioning: Callable[[Sequence[int]], Conditioning] = lambda ids: {}


def image_numbers(settings: Settings) -> tuple[range, range]:
    """Return the numbers of the images to learn from, and of the held-out ones."""
    first = range(settings.trajectories)
    return first, range(first.stop, first.stop + settings.held_out)


def sampler_for(parts: Parts, settings: Settings) -> Sampler:
    """Return the sampler for a scheduler and the settings.

    Raises:
        UnsupportedModelError: Scheduler that is not supported.
        ConfigurationError: Window that is longer than the trajectory.
    """
    sampler = sampler_of(parts.scheduler, settings.steps, settings.eta)
    if isinstance(settings.window, int) and settings.window > len(sampler.timesteps):
        raise ConfigurationError(
            f"window={settings.window} is longer than the trajectory of {len(sampler.timesteps)} steps: write"
            f" window={usual_window(len(sampler.timesteps))}, or leave it out."
        )
    return sampler


def start(trainer: pl.Trainer, parts: Parts, settings: Settings, cache_dir: Path | None) -> Calibration:
    """Print plan and estimate, generate the float trajectories, and insert quantizers without ranges.

    Args:
        trainer: Trainer, which determines the folders and the ranks.
        parts: Parts of the model; quantizers of an earlier quantization are removed.
        settings: Settings of the calibration.
        cache_dir: Folder of the float trajectories; None is ``accuquant`` in ``default_root_dir``.

    Raises:
        ConfigurationError, UnsupportedModelError, CheckpointError, QuantizationError: See :func:`sampler_for`,
            :func:`~lightning_quant.accuquant.plan.plan_denoiser`, :func:`trajectories` and :func:`call_once`.
    """
    network = parts.denoiser.network
    strip(network)
    check_weights_agree(network)
    sampler = sampler_for(parts, settings)
    learned, held_out = image_numbers(settings)
    with evaluating(network):
        plan = plan_denoiser(network, settings, lambda: call_once(parts, sampler, 1))
        seconds = _timed(parts, sampler, settings)
    rank_zero_info(f"{plan}\n{estimate(plan, sampler, parts.shape, seconds, trainer.world_size)}")
    cache = trajectories(trainer, parts, sampler, settings, cache_dir, range(learned.start, held_out.stop))
    length = settings.window if isinstance(settings.window, int) else usual_window(len(sampler.timesteps))
    groups = windows_of(len(sampler.timesteps), length) if settings.activation_parameters == "per_group" else []
    starts = [sampler.timesteps[group.start] for group in groups]
    prepare(network, plan, sorted(set(starts), reverse=True))
    source = Source(parts.denoiser, sampler, plan, cache, learned, held_out, trainer.global_rank, trainer.world_size)
    return Calibration(source)


def trajectories(
    trainer: pl.Trainer,
    parts: Parts,
    sampler: Sampler,
    settings: Settings,
    cache_dir: Path | None,
    ids: range,
) -> TrajectoryCache:
    """Generate the missing float trajectories of some images; the network must be in float.

    A ``cache_dir`` holds trajectories of one model and sampler. In the Trainer's folder, each model and sampler has
    its own subfolder, so that a module that was trained further gets new trajectories.
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
    """Call the float denoiser at the first step and return its output.

    Raises:
        ConfigurationError: Denoiser that cannot be called with these inputs.
        QuantizationError: Output with NaN or infinities.
    """
    device = device_of(parts.denoiser.network, torch.device("cpu"))
    x = initial_noise(parts.shape, range(images), 0).to(device)
    rows = rows_to(parts.conditioning(range(images)), device)
    output = check_call(parts.denoiser, x, sampler.timesteps[0], rows)
    check_finite(output, 0, sampler.timesteps[0], range(images))
    return output


@torch.no_grad()
def _timed(parts: Parts, sampler: Sampler, settings: Settings) -> float:
    """Measure the seconds of a float call for one batch."""
    begin = time.perf_counter()
    call_once(parts, sampler, settings.batch_size)
    return time.perf_counter() - begin


def estimate(plan: DenoiserPlan, sampler: Sampler, shape: tuple[int, ...], seconds: float, ranks: int = 1) -> str:
    """Describe the expected time, memory and disk space of a calibration.

    Args:
        plan: Plan of the denoiser.
        sampler: Sampler of the trajectories.
        shape: Shape (C, H, W) of a state.
        seconds: Seconds of a float call for one batch.
        ranks: Number of ranks that share the work.
    """
    settings, steps = plan.settings, len(sampler.timesteps)
    length = settings.window if isinstance(settings.window, int) else usual_window(steps)
    images = settings.trajectories + settings.held_out
    float_calls = images / settings.batch_size * steps
    walked = network_calls(settings.adjoint, length) - length
    update = walked * FORWARD + length * BACKWARD
    # The checks, with one at the start and two of single steps.
    checks = (settings.updates / settings.check_every + 3) * settings.held_out / settings.batch_size * steps * FORWARD
    learning = settings.updates * update * (1.25 if settings.window == "sweep" else 1) + checks
    # All blocks together cost about as much as the network.
    blocks = settings.reconstruction * BLOCK_BATCH / settings.batch_size * BACKWARD
    size = trajectory_bytes(images, steps, shape, sampler.history)
    times = [duration(calls * seconds / ranks) for calls in (float_calls, learning, blocks)]
    graphs = length if settings.adjoint == "bptt" else 1
    blockwise = f" {settings.reconstruction} iterations on each block, {times[2]};" if settings.reconstruction else ""
    return (
        f"Calibration over windows of {'a length to be searched, about ' * (settings.window == 'sweep')}{length} of"
        f" {steps} steps, {settings.adjoint} gradient: float trajectories of {images} images, {times[0]} and"
        f" {size / 1e6:.1f} MB on disk, unless they exist already;{blockwise} {settings.updates} updates of"
        f" {settings.batch_size} images, {times[1]}, in the memory of {graphs} network call{'s' * (graphs > 1)} with"
        " gradients."
    )
