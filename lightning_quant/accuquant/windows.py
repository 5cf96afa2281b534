"""Gradients of the error accumulated over a window of denoising steps, in the memory of one network call.

Source: Lee et al., "AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models", NeurIPS 2025
(arXiv 2510.20348).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

Adjoint = Literal["identity", "coefficient", "exact", "bptt", "per_step"]
Denoise = Callable[[Tensor, int], Tensor]
History = tuple[Tensor, ...]

# Adjoints that run forward to the last step before they compute any gradient.
_WALKING = ("identity", "coefficient", "exact")


class Steps(Protocol):
    """Interface of a sampler, see :class:`lightning_quant.accuquant.samplers.Sampler`."""

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timestep of each network call."""

    def step(
        self, k: int, x: Tensor, output: Tensor, history: History, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """Return the next state and its history."""


@dataclass(frozen=True)
class Window:
    """Consecutive steps of a batch of trajectories.

    Attributes:
        start: Index of the first step.
        states: States of the float model, (steps + 1, n, C, H, W), from the start of the window to the target.
        histories: History of the float sampler before each step; empty for single-step samplers.
        noises: Noise of each step; empty if the sampler needs none.
        x: State from which the quantized model starts; None takes the first state.
        total: Number of images that the loss is averaged over; None takes n, more if ranks share a batch.
    """

    start: int
    states: Tensor
    histories: tuple[History, ...] = ()
    noises: tuple[Tensor | None, ...] = ()
    x: Tensor | None = None
    total: int | None = None

    def __len__(self) -> int:
        return len(self.states) - 1

    @property
    def begin(self) -> Tensor:
        """State from which the quantized model starts."""
        return self.states[0] if self.x is None else self.x

    def history(self, step: int) -> History:
        """Return the float sampler's history before a step of the window."""
        return self.histories[step] if self.histories else ()

    def noise(self, step: int) -> Tensor | None:
        """Return the noise of a step of the window."""
        return self.noises[step] if self.noises else None

    def single(self, step: int) -> Window:
        """Return a window of one step, from the float state."""
        states = self.states[step : step + 2]
        histories, noises = self.histories[step : step + 1], self.noises[step : step + 1]
        return Window(self.start + step, states, histories, noises, total=self.total)


@dataclass
class Rollout:
    """States (steps + 1), outputs (steps) and histories (steps + 1) of a rollout over a window."""

    states: list[Tensor]
    histories: list[History]
    outputs: list[Tensor] = field(default_factory=list)


def window_loss(denoise: Denoise, sampler: Steps, window: Window, adjoint: Adjoint = "identity") -> Tensor:
    """Add the gradients of a window's loss to the leaf tensors of the network's quantizers.

    The loss is the squared error of the state at the end of the window, summed over elements and averaged over images.
    ``identity`` passes its gradient unchanged to every state of the window, bypassing the networks in between, and
    then recomputes one step at a time with autograd, in the memory of one network call whatever the length.
    ``coefficient`` bypasses the networks but not the sampler's factors. ``exact`` backpropagates through the steps,
    recomputing one at a time, and equals ``bptt``, which stores all of them. ``per_step`` starts each step at the float
    state, as earlier methods do, and sums the errors of the steps.

    A multistep sampler uses an output in several steps; the gradient of an output sums over all of them.

    Args:
        denoise: Function from a state (n, C, H, W) and its timestep to the output that the sampler takes.
        sampler: Sampler that takes the steps.
        window: Window of float states and noise.
        adjoint: Way in which the gradient is propagated back.

    Returns:
        Loss, detached.

    Example:
        >>> from lightning_quant.accuquant.samplers import sampler_of
        >>> from diffusers import DDIMScheduler
        >>> scale = torch.ones((), requires_grad=True)
        >>> window = Window(0, torch.zeros(3, 1, 1, 2, 2), x=torch.ones(1, 1, 2, 2))
        >>> loss = window_loss(lambda x, t: scale * x, sampler_of(DDIMScheduler(), 10), window)
        >>> bool(loss > 0), bool(scale.grad != 0)
        (True, True)
    """
    return _ADJOINTS[adjoint](denoise, sampler, window)


def network_calls(adjoint: Adjoint, length: int) -> int:
    """Return the number of network calls of :func:`window_loss`, of which ``length`` have a backward pass.

    Example:
        >>> network_calls("identity", 4), network_calls("per_step", 4)
        (7, 4)
    """
    return 2 * length - 1 if adjoint in _WALKING else length


@torch.no_grad()
def roll(denoise: Denoise, sampler: Steps, window: Window, steps: int | None = None) -> Rollout:
    """Run the quantized model over a window, or over its first ``steps`` steps, without gradients."""
    rollout = Rollout([window.begin], [window.history(0)])
    for step in range(len(window) if steps is None else steps):
        k, x = window.start + step, rollout.states[-1]
        output = denoise(x, sampler.timesteps[k])
        following, history = sampler.step(k, x, output, rollout.histories[-1], window.noise(step))
        rollout.outputs.append(output)
        rollout.states.append(following)
        rollout.histories.append(history)
    return rollout


def _loss(x: Tensor, window: Window) -> Tensor:
    return (x - window.states[-1]).square().sum() / (window.total or len(x))


def _bptt(denoise: Denoise, sampler: Steps, window: Window) -> Tensor:
    x, history = window.begin, window.history(0)
    for step in range(len(window)):
        k = window.start + step
        x, history = sampler.step(k, x, denoise(x, sampler.timesteps[k]), history, window.noise(step))
    loss = _loss(x, window)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _exact(denoise: Denoise, sampler: Steps, window: Window) -> Tensor:
    # The last step is computed with its graph, as it is the first one of the backward pass.
    last = len(window) - 1
    rollout = roll(denoise, sampler, window, last)
    loss, gradients = torch.zeros(()), list[Tensor | None]()
    for step in range(last, -1, -1):
        k = window.start + step
        x, *history = (t.detach().requires_grad_() for t in (rollout.states[step], *rollout.histories[step]))
        following = sampler.step(k, x, denoise(x, sampler.timesteps[k]), tuple(history), window.noise(step))
        if step == last:
            loss = _loss(following[0], window)
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            pairs = [(t, g) for t, g in zip((following[0], *following[1]), gradients, strict=True) if g is not None]
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        gradients = [t.grad for t in (x, *history)]
    return loss.detach()


def _identity(denoise: Denoise, sampler: Steps, window: Window) -> Tensor:
    return _bypass(denoise, sampler, window, straight=True)


def _coefficient(denoise: Denoise, sampler: Steps, window: Window) -> Tensor:
    return _bypass(denoise, sampler, window, straight=False)


def _bypass(denoise: Denoise, sampler: Steps, window: Window, straight: bool) -> Tensor:
    # The last call keeps its graph; all gradients can be computed once its output is there.
    last = len(window) - 1
    rollout = roll(denoise, sampler, window, last)
    output = denoise(rollout.states[last], sampler.timesteps[window.start + last])
    loss, gradients = _output_gradients(sampler, window, [*rollout.outputs, output], straight)
    for step in range(last, -1, -1):
        if step < last:
            output = denoise(rollout.states[step], sampler.timesteps[window.start + step])
        if gradients[step] is not None:
            output.backward(gradients[step])  # type: ignore[no-untyped-call]
    return loss


def _output_gradients(
    sampler: Steps, window: Window, outputs: list[Tensor], straight: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the loss and its gradient in each output, through the steps alone: networks count as constants."""
    outputs = [output.detach().requires_grad_() for output in outputs]
    x, history = window.begin, window.history(0)
    for step, output in enumerate(outputs):
        k, before = window.start + step, x
        x, history = sampler.step(k, x.detach() if straight else x, output, history, window.noise(step))
        if straight:
            # The value of the step, with the gradient of the identity.
            x = x + (before - before.detach())
    loss = _loss(x, window)
    # If a Runge-Kutta start is split between windows, an output may be unused in this one.
    return loss.detach(), torch.autograd.grad(loss, outputs, allow_unused=True)


def _per_step(denoise: Denoise, sampler: Steps, window: Window) -> Tensor:
    losses = [_bptt(denoise, sampler, window.single(step)) for step in range(len(window))]
    return torch.stack(losses).sum()


_ADJOINTS: dict[str, Callable[[Denoise, Steps, Window], Tensor]] = {
    "identity": _identity,
    "coefficient": _coefficient,
    "exact": _exact,
    "bptt": _bptt,
    "per_step": _per_step,
}
