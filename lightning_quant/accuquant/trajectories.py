"""Rolling a sampler out, the same for float and quantized networks, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.windows import History, Window
from lightning_quant.data.noise import numbers, step_noise
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.nn.modes import evaluating

if TYPE_CHECKING:
    from lightning_quant.accuquant.denoiser import Conditioning, Denoiser
    from lightning_quant.accuquant.samplers import Sampler

# Called with how many images have taken one step more: images times steps in all.
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Trajectories:
    """States of n images over consecutive steps, or of a window of the steps.

    Attributes:
        states: (steps + 1, n, C, H, W) FP32, from noise to image; the last one alone where no others were kept.
        outputs: (steps, n, C, H, W) of the denoiser, or None; kept for samplers with history, not kept of windows.
        conditioning: rows (n, ...) by name.
        ids: (n,) int64, the numbers of the images.
        seed: of their noise.
        stochastic: whether the sampler's steps take noise.
        start: the step that ``states[0]`` is the state before.
        histories: of a window, what the float sampler carried beside the state before each step, tensors (n, ...);
            empty for samplers without history.
    """

    states: Tensor
    outputs: Tensor | None
    conditioning: Conditioning
    ids: Tensor
    seed: int
    stochastic: bool = False
    start: int = 0
    histories: tuple[History, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def steps(self) -> range:
        """The steps between the states."""
        return range(self.start, self.start + len(self.states) - 1)

    def batch(self, index: Tensor | slice) -> Trajectories:
        """Some of the images.

        Args:
            index: rows, as a slice, int64 or bool.
        """
        return replace(
            self,
            states=self.states[:, index],
            outputs=None if self.outputs is None else self.outputs[:, index],
            conditioning={name: rows[index] for name, rows in self.conditioning.items()},
            ids=self.ids[index],
            histories=tuple(tuple(rows[index] for rows in history) for history in self.histories),
        )

    def window(self, start: int, stop: int, sampler: Sampler) -> Trajectories:
        """The steps start .. stop - 1 of all images, with the float history before each.

        Args:
            start: first step.
            stop: the step after the last.
            sampler: that the trajectories are of.

        Raises:
            ConfigurationError: not among the steps, or no outputs for a sampler with history.
        """
        check_window(start, stop, self.steps)
        if sampler.history and self.outputs is None:
            raise ConfigurationError(
                f"{type(sampler).__name__} uses earlier outputs, and these trajectories have none: take the window of"
                " trajectories that generate(..., keep=True) made with this sampler."
            )
        states = self.states[start - self.start : stop - self.start + 1]
        histories = histories_of(sampler, range(start, stop), self.states, self.outputs)
        return replace(self, states=states, outputs=None, start=start, histories=histories)

    def noise(self, k: int) -> Tensor | None:
        """Noise of step k, (n, C, H, W) where the states are; None where steps take none."""
        if not self.stochastic:
            return None
        return step_noise(self.states.shape[2:], self.ids, k, self.seed).to(self.states.device)

    def to_window(self) -> Window:
        """What :func:`lightning_quant.accuquant.windows.window_loss` walks over: all steps."""
        noises = tuple(noise for noise in map(self.noise, self.steps) if noise is not None)
        return Window(self.start, self.states, self.histories, noises)

    def to(self, device: torch.device | str) -> Trajectories:
        """All tensors but ``ids`` on a device."""
        return replace(
            self,
            states=self.states.to(device),
            outputs=None if self.outputs is None else self.outputs.to(device),
            conditioning=rows_to(self.conditioning, device),
            histories=tuple(tuple(rows.to(device) for rows in history) for history in self.histories),
        )


def generate(
    denoiser: Denoiser,
    sampler: Sampler,
    x: Tensor,
    conditioning: Conditioning,
    ids: Iterable[int] | Tensor,
    seed: int,
    keep: bool = False,
    progress: Progress | None = None,
    batch: int | None = None,
) -> Trajectories:
    """Take all steps of a sampler, without gradients, the network in evaluation mode.

    Args:
        denoiser: runs where the parameters of its network are.
        sampler: a step for each of its timesteps.
        x: (n, C, H, W) noise, as :func:`initial_noise` draws it; the result is on its device.
        conditioning: rows (n, ...) by name, {} for none.
        ids: (n,) numbers of the images, which their noise depends on.
        seed: of the noise of stochastic samplers.
        keep: all states, and all outputs where the sampler has a history; else the last state alone.
        progress: called with the number of images after each step that they took.
        batch: images at once, None for all.

    Returns:
        the samples are ``states[-1]``.

    Raises:
        QuantizationError: an output with NaN or infinities.
        ConfigurationError: numbers of images, noise and conditioning that do not agree.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from lightning_quant.accuquant.samplers import sampler_of
        >>> class Denoiser:
        ...     network, guidance = torch.nn.Identity(), None
        ...     def __call__(self, x, t, conditioning):
        ...         return 0.1 * x
        >>> x = torch.ones(4, 1, 2, 2)
        >>> found = generate(Denoiser(), sampler_of(DDIMScheduler(), 10), x, {}, range(4), seed=0, keep=True)
        >>> found.states.shape, found.window(6, 8, sampler_of(DDIMScheduler(), 10)).states.shape
        (torch.Size([11, 4, 1, 2, 2]), torch.Size([3, 4, 1, 2, 2]))
    """
    found = numbers(ids)
    _check_rows(x, conditioning, found)
    parts = []
    with torch.no_grad(), evaluating(denoiser.network):
        for rows in _slices(len(found), batch):
            some = {name: values[rows] for name, values in conditioning.items()}
            parts.append(_roll(denoiser, sampler, x[rows], some, found[rows], seed, keep, progress))
    outputs = [each for _, each in parts if each is not None]
    return Trajectories(
        states=torch.cat([states for states, _ in parts], dim=1),
        outputs=torch.cat(outputs, dim=1) if outputs else None,
        conditioning=conditioning,
        ids=torch.tensor(found),
        seed=seed,
        stochastic=sampler.stochastic,
    )


def _roll(
    denoiser: Denoiser,
    sampler: Sampler,
    x: Tensor,
    conditioning: Conditioning,
    ids: list[int],
    seed: int,
    keep: bool,
    progress: Progress | None,
) -> tuple[Tensor, Tensor | None]:
    """States and outputs of one batch."""
    home, device = x.device, device_of(denoiser.network, x.device)
    states: list[Tensor] = [x.float()]
    outputs: list[Tensor] = []
    x, conditioning, history = states[0].to(device), rows_to(conditioning, device), sampler.start()
    for k, t in enumerate(sampler.timesteps):
        output = denoiser(x, t, conditioning)
        check_finite(output, k, t, ids)
        noise = step_noise(x.shape[1:], ids, k, seed).to(device) if sampler.stochastic else None
        x, history = sampler.step(k, x, output, history, noise)
        if keep:
            states.append(x.to(home))
            if sampler.history:
                outputs.append(output.to(home))
        if progress is not None:
            progress(len(ids))
    kept = torch.stack(states) if keep else x.to(home)[None]
    return kept, torch.stack(outputs) if outputs else None


def histories_of(sampler: Sampler, steps: range, states: Any, outputs: Any) -> tuple[History, ...]:
    """What a sampler carries along before each of some steps of float trajectories; empty without history.

    Args:
        sampler: that the trajectories are of.
        steps: consecutive.
        states: (n, C, H, W) by the number of the step.
        outputs: likewise.
    """
    return tuple(sampler.history_at(k, states, outputs) for k in steps) if sampler.history else ()


def trajectory_bytes(images: int, steps: int, shape: Iterable[int], history: int = 0) -> int:
    """Size of trajectories in FP32, in memory and on disk, conditioning left out.

    Args:
        images: how many.
        steps: of the sampler, its network calls.
        shape: (C, H, W) of a state.
        history: of the sampler; with one, outputs are kept too.

    Example:
        >>> trajectory_bytes(256, 50, (4, 64, 64)) / 1e9
        0.855638016
    """
    return 4 * images * prod(shape) * (steps + 1 + (steps if history else 0))


def check_finite(output: Tensor, k: int, timestep: int, ids: Iterable[int] | Tensor) -> None:
    """Raise a QuantizationError where the output of a step has NaN or infinities.

    Args:
        output: (n, C, H, W).
        k: the step.
        timestep: of the step.
        ids: (n,) numbers of the images.
    """
    if bool(output.isfinite().all()):
        return
    rows = (~output.isfinite()).flatten(1).any(dim=1).tolist()
    bad = [number for number, is_bad in zip(numbers(ids), rows, strict=True) if is_bad]
    what = "NaN" if bool(output.isnan().any()) else "infinite values"
    several = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    raise QuantizationError(
        f"The denoiser's output contains {what} at step {k} (timestep {timestep}), for the images"
        f" {', '.join(map(str, bad[:4]))}{several}. Look for NaN among its weights and its conditioning; where it"
        " runs in half precision, load it with torch_dtype=torch.float32 and write precision='32-true'."
    )


def check_window(start: int, stop: int, steps: range) -> None:
    """Raise a ConfigurationError where start .. stop - 1 are not steps of a trajectory."""
    if not steps.start <= start < stop <= steps.stop:
        raise ConfigurationError(
            f"The window of steps {start} .. {stop - 1} is not within the trajectory's, {steps.start} .."
            f" {steps.stop - 1}: expected {steps.start} <= start < stop <= {steps.stop}."
        )


def device_of(network: nn.Module, other: torch.device) -> torch.device:
    """Where the parameters of a network are, or another device where it has none."""
    first = next(network.parameters(), None)
    return other if first is None else first.device


def rows_to(conditioning: Conditioning, device: torch.device | str) -> Conditioning:
    """Conditioning on a device."""
    return {name: rows.to(device) for name, rows in conditioning.items()}


def _slices(count: int, batch: int | None) -> list[slice]:
    size = count if batch is None else batch
    if count < 1 or size < 1:
        raise ConfigurationError(f"{count} images in batches of {size}: expected at least one of each.")
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _check_rows(x: Tensor, conditioning: Conditioning, ids: list[int]) -> None:
    rows = {"x": len(x), **{name: len(values) for name, values in conditioning.items()}}
    for name, found in rows.items():
        if found != len(ids):
            raise ConfigurationError(f"{name} has {found} rows for {len(ids)} images: give it one row for each of ids.")
