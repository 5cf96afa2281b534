"""Sampling trajectories of float and quantized networks."""

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

# Function that is called with the number of images after each of their steps.
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Trajectories:
    """States of n images over all steps of a sampler, or over a window of them.

    Attributes:
        states: States (steps + 1, n, C, H, W) in FP32, from noise to image; only the last one if no others were kept.
        outputs: Outputs of the denoiser (steps, n, C, H, W), kept for samplers with history, else None; None in
            windows.
        conditioning: Rows (n, ...) by name.
        ids: Numbers of the images, (n,) int64.
        seed: Seed of the noise.
        stochastic: Whether the sampler's steps take noise.
        start: Index of the step that starts at ``states[0]``.
        histories: History of the float sampler before each step of a window, tensors (n, ...); empty for samplers
            without history.
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
        """Indices of the steps between the states."""
        return range(self.start, self.start + len(self.states) - 1)

    def batch(self, index: Tensor | slice) -> Trajectories:
        """Select some of the images.

        Args:
            index: Rows, as a slice or as an int64 or bool tensor.
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
        """Return the steps start .. stop - 1 of all images, with the float history before each.

        Args:
            start: Index of the first step.
            stop: Index after the last step.
            sampler: Sampler of the trajectories.

        Raises:
            ConfigurationError: Steps outside the trajectories, or missing outputs for a sampler with history.
        """
        check_window(start, stop, self.steps)
        if sampler.history and self.outputs is None:
            raise ConfigurationError(
                f"{type(sampler).__name__} uses earlier outputs, and these trajectories have none: take the window from"
                " trajectories that generate(..., keep=True) made with this sampler."
            )
        states = self.states[start - self.start : stop - self.start + 1]
        histories = histories_of(sampler, range(start, stop), self.states, self.outputs)
        return replace(self, states=states, outputs=None, start=start, histories=histories)

    def noise(self, k: int) -> Tensor | None:
        """Return the noise of step k, (n, C, H, W), on the states' device; None if steps take no noise."""
        if not self.stochastic:
            return None
        return step_noise(self.states.shape[2:], self.ids, k, self.seed).to(self.states.device)

    def to_window(self) -> Window:
        """Convert all steps to a window for :func:`lightning_quant.accuquant.windows.window_loss`."""
        noises = tuple(noise for noise in map(self.noise, self.steps) if noise is not None)
        return Window(self.start, self.states, self.histories, noises)

    def to(self, device: torch.device | str) -> Trajectories:
        """Move all tensors except ``ids`` to a device."""
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
    """Take all steps of a sampler, without gradients and with the network in eval mode.

    Args:
        denoiser: Denoiser, which runs on the device of its network's parameters.
        sampler: Sampler with one step per timestep.
        x: Initial noise (n, C, H, W), as :func:`initial_noise` draws it; the result is on its device.
        conditioning: Rows (n, ...) by name; {} for none.
        ids: Numbers of the images, (n,), which determine their noise.
        seed: Seed of the noise of stochastic samplers.
        keep: Keep all states, and all outputs if the sampler has a history; otherwise only the last state.
        progress: Function that is called with the number of images after each of their steps.
        batch: Number of images computed at once; None computes all together.

    Returns:
        Trajectories, whose samples are ``states[-1]``.

    Raises:
        QuantizationError: Output with NaN or infinities.
        ConfigurationError: Image numbers, noise and conditioning of different lengths.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from lightning_quant.accuquant.samplers import sampler_of
        >>> class Denoiser:
        ...     network, guidance = torch.nn.Identity(), None
        ...     def __call__(self, x, t, conditioning):
        ...         return 0.1 * x
        >>> x = torch.ones(4, 1, 2, 2)
        >>> sampler = sampler_of(DDIMScheduler(), 10)
        >>> trajectories = generate(Denoiser(), sampler, x, {}, range(4), seed=0, keep=True)
        >>> trajectories.states.shape, trajectories.window(6, 8, sampler).states.shape
        (torch.Size([11, 4, 1, 2, 2]), torch.Size([3, 4, 1, 2, 2]))
    """
    image_numbers = numbers(ids)
    _check_rows(x, conditioning, image_numbers)
    parts = []
    with torch.no_grad(), evaluating(denoiser.network):
        for rows in _slices(len(image_numbers), batch):
            selected = {name: values[rows] for name, values in conditioning.items()}
            parts.append(_roll(denoiser, sampler, x[rows], selected, image_numbers[rows], seed, keep, progress))
    outputs = [part_outputs for _, part_outputs in parts if part_outputs is not None]
    return Trajectories(
        states=torch.cat([states for states, _ in parts], dim=1),
        outputs=torch.cat(outputs, dim=1) if outputs else None,
        conditioning=conditioning,
        ids=torch.tensor(image_numbers),
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
    """Take all steps for one batch and return its states and outputs."""
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
    stacked = torch.stack(states) if keep else x.to(home)[None]
    return stacked, torch.stack(outputs) if outputs else None


def histories_of(sampler: Sampler, steps: range, states: Any, outputs: Any) -> tuple[History, ...]:
    """Return the history before each of some steps of float trajectories; empty for samplers without history.

    Args:
        sampler: Sampler of the trajectories.
        steps: Indices of consecutive steps.
        states: States (n, C, H, W), indexed by step.
        outputs: Outputs (n, C, H, W), indexed by step.
    """
    return tuple(sampler.history_at(k, states, outputs) for k in steps) if sampler.history else ()


def trajectory_bytes(images: int, steps: int, shape: Iterable[int], history: int = 0) -> int:
    """Return the size in bytes of FP32 trajectories, in memory and on disk, without conditioning.

    Args:
        images: Number of images.
        steps: Number of steps of the sampler, which is that of its network calls.
        shape: Shape (C, H, W) of a state.
        history: History of the sampler; above 0, outputs are kept too.

    Example:
        >>> trajectory_bytes(256, 50, (4, 64, 64)) / 1e9
        0.855638016
    """
    return 4 * images * prod(shape) * (steps + 1 + (steps if history else 0))


def check_finite(output: Tensor, k: int, timestep: int, ids: Iterable[int] | Tensor) -> None:
    """Raise a QuantizationError if the output of a step has NaN or infinities.

    Args:
        output: Output of the denoiser, (n, C, H, W).
        k: Index of the step.
        timestep: Timestep of the step.
        ids: Numbers of the images, (n,).
    """
    if bool(output.isfinite().all()):
        return
    rows = (~output.isfinite()).flatten(1).any(dim=1).tolist()
    bad = [number for number, is_bad in zip(numbers(ids), rows, strict=True) if is_bad]
    what = "NaN" if bool(output.isnan().any()) else "infinite values"
    several = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    raise QuantizationError(
        f"The denoiser's output contains {what} at step {k} (timestep {timestep}), for the images"
        f" {', '.join(map(str, bad[:4]))}{several}. Look for NaN in its weights and its conditioning; if it runs in"
        " half precision, load it with torch_dtype=torch.float32 and write precision='32-true'."
    )


def check_window(start: int, stop: int, steps: range) -> None:
    """Raise a ConfigurationError if start .. stop - 1 are not steps of a trajectory."""
    if not steps.start <= start < stop <= steps.stop:
        raise ConfigurationError(
            f"The window of steps {start} .. {stop - 1} is not within the trajectory's, {steps.start} .."
            f" {steps.stop - 1}: expected {steps.start} <= start < stop <= {steps.stop}."
        )


def device_of(network: nn.Module, other: torch.device) -> torch.device:
    """Return the device of a network's parameters, or ``other`` if it has none."""
    first = next(network.parameters(), None)
    return other if first is None else first.device


def rows_to(conditioning: Conditioning, device: torch.device | str) -> Conditioning:
    """Move conditioning to a device."""
    return {name: rows.to(device) for name, rows in conditioning.items()}


def _slices(count: int, batch: int | None) -> list[slice]:
    size = count if batch is None else batch
    if count < 1 or size < 1:
        raise ConfigurationError(f"{count} images in batches of {size}: expected at least one of each.")
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _check_rows(x: Tensor, conditioning: Conditioning, ids: list[int]) -> None:
    rows = {"x": len(x), **{name: len(values) for name, values in conditioning.items()}}
    for name, count in rows.items():
        if count != len(ids):
            raise ConfigurationError(f"{name} has {count} rows for {len(ids)} images: expected one row per image.")
