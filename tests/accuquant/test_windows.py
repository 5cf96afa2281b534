"""Gradients over windows of steps: against full back-propagation, and against formulas in FP64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks.saved_bytes import peak_saved_bytes
from helpers.ranged import float_trajectories, gradients, learning, network_of, ranged
from helpers.rollouts import sampler
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.samplers import Sampler
from lightning_quant.accuquant.trajectories import Trajectories
from lightning_quant.accuquant.windows import Adjoint, Window, network_calls, roll, window_loss

ADJOINTS: tuple[Adjoint, ...] = get_args(Adjoint)
SAMPLERS = ("ddim", "ddim_eta", "ddpm", "plms", "prk", "dpm")
every = pytest.mark.parametrize("kind", SAMPLERS)
_BOTH: tuple[Adjoint, Adjoint] = ("exact", "bptt")
multistep = pytest.mark.parametrize("kind", ["plms", "prk", "dpm"])
Denoise = Callable[[Tensor, int], Tensor]


@cache
def learned() -> tuple[Any, dict[str, Tensor]]:
    """A quantized UNet that learns, and its leaves."""
    network = ranged("flat")
    return network, learning(network)


@cache
def trajectories(kind: str, steps: int = 6) -> tuple[Sampler, Trajectories]:
    own = sampler(kind, steps)
    return own, float_trajectories(network_of("flat"), own)


def window_of(kind: str, start: int, stop: int, steps: int = 6) -> tuple[Sampler, Window]:
    own, found = trajectories(kind, steps)
    return own, found.window(start, stop, own).to_window()


def unet() -> Denoise:
    denoiser = Denoiser(learned()[0])
    return lambda x, t: denoiser(x, t, {})


def gradient(kind: str, start: int, stop: int, adjoint: Adjoint) -> tuple[float, Tensor]:
    """Loss, and its gradients by all leaves of the UNet in one row."""
    own, window = window_of(kind, start, stop)
    loss = window_loss(unet(), own, window, adjoint)
    return float(loss), gradients(learned()[1].values())


def distance(a: Tensor, b: Tensor) -> float:
    """Of the first to the second, in lengths of the second."""
    assert b.norm() > 0
    return float((a.double() - b.double()).norm() / b.double().norm())


@every
@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, 5)])
def test_exact_is_full_back_propagation(kind: str, start: int, stop: int | None) -> None:
    stop = stop or len(trajectories(kind)[0].timesteps)
    (loss, exact), (expected, bptt) = (gradient(kind, start, stop, adjoint) for adjoint in _BOTH)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert distance(exact, bptt) < 1e-5


@every
@pytest.mark.parametrize("start", [0, 1, 4])
def test_all_adjoints_are_equal_over_one_step(kind: str, start: int) -> None:
    found = {adjoint: gradient(kind, start, start + 1, adjoint) for adjoint in ADJOINTS}
    loss, expected = found.pop("bptt")
    for other, found_gradient in found.values():
        assert other == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(found_gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["ddim", "plms", "dpm"])
def test_over_several_steps_they_are_not(kind: str) -> None:
    bptt = gradient(kind, 1, 5, "bptt")[1]
    found = {adjoint: gradient(kind, 1, 5, adjoint)[1] for adjoint in ADJOINTS if adjoint not in _BOTH}
    assert all(distance(other, bptt) > 1e-3 for other in found.values())
    assert distance(found["identity"], found["coefficient"]) > 1e-3


@every
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_float_model_itself_has_no_loss_and_no_gradient(kind: str, adjoint: Adjoint) -> None:
    own, window = window_of(kind, 1, 4)
    denoiser, scale = Denoiser(network_of("flat")), torch.ones((), requires_grad=True)
    loss = window_loss(lambda x, t: scale * denoiser(x, t, {}), own, window, adjoint)
    assert float(loss) == pytest.approx(0, abs=1e-9)
    assert scale.grad is None or abs(float(scale.grad)) < 1e-4


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "plms"])
def test_gradients_of_shares_of_a_batch_add_up(kind: str, adjoint: Adjoint) -> None:
    own, found = trajectories(kind)
    leaf = Q.clone().requires_grad_()

    def share(rows: slice) -> float:
        window = replace(found.batch(rows).window(1, 4, own).to_window(), total=2)
        return float(window_loss(lambda x, t: small(x, t, leaf), own, window, adjoint))

    loss, whole = share(slice(0, 2)), gradients([leaf])
    assert sum(share(slice(row, row + 1)) for row in range(2)) == pytest.approx(loss, rel=1e-5)
    assert distance(gradients([leaf]), whole) < 1e-5


# -- against formulas -------------------------------------------------------------------------------------------------


Q = torch.tensor([0.8, 0.1, 0.3], dtype=torch.float64)


def small(x: Tensor, t: int, q: Tensor) -> Tensor:
    """A network of three numbers."""
    q = q.to(x.dtype)
    return q[0] * torch.tanh(x + q[1]) + q[2] * torch.sin(2 * x) * (t / 1000)


def ddim_by_hand(alphas: Tensor, timesteps: tuple[int, ...], k: int, x: Tensor, output: Tensor) -> Tensor:
    """x' = sqrt(a') (x - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a') e."""
    a = alphas[timesteps[k]]
    following = alphas[timesteps[k + 1]] if k + 1 < len(timesteps) else torch.ones_like(a)
    return following.sqrt() * (x - (1 - a).sqrt() * output) / a.sqrt() + (1 - following).sqrt() * output


def double_window(start: int, stop: int, *shape: int) -> Window:
    states = torch.randn(stop - start + 1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Window(start, states)


def derivative(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences by each number of ``at``, (numbers, *output)."""
    found = []
    for place in range(at.numel()):
        moved = torch.zeros_like(at)
        moved.view(-1)[place] = step
        found.append((function(at + moved) - function(at - moved)) / (2 * step))
    return torch.stack(found)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (2, 5), (4, 6)])
@pytest.mark.parametrize("straight", [True, False])
def test_identity_and_coefficient_are_their_sums_over_the_steps(start: int, stop: int, straight: bool) -> None:
    """sum_k (d x_{k+1} / d q with x_k fixed)^T u_k: u_k = u, or u with the sampler's own factors of x."""
    own = sampler("ddim", clip_sample=False, set_alpha_to_one=True)
    scheduler: Any = DDIMScheduler()
    alphas = scheduler.alphas_cumprod.double()
    window, q = double_window(start, stop, 2, 1, 2, 2), Q

    def step(k: int, x: Tensor, numbers: Tensor) -> Tensor:
        return ddim_by_hand(alphas, own.timesteps, k, x, small(x, own.timesteps[k], numbers))

    states = [window.states[0]]
    for k in range(start, stop):
        states.append(step(k, states[-1], q))
    u = 2 * (states[-1] - window.states[-1]) / 2
    expected, factor = torch.zeros_like(q), 1.0
    for k in reversed(range(start, stop)):
        x = states[k - start]
        by_q = derivative(lambda numbers, k=k, x=x: step(k, x, numbers), q)  # type: ignore[misc]
        expected += factor * (by_q * u).flatten(1).sum(1)
        if not straight:
            one = torch.ones((), dtype=torch.float64)
            factor *= float(ddim_by_hand(alphas, own.timesteps, k, one, 0 * one))
    leaf = q.clone().requires_grad_()
    adjoint: Adjoint = "identity" if straight else "coefficient"
    loss = window_loss(lambda x, t: small(x, t, leaf), own, window, adjoint)
    assert float(loss) == pytest.approx(float((states[-1] - window.states[-1]).square().sum() / 2), rel=1e-5)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)


@multistep
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (2, 6), (3, 5)])
@pytest.mark.parametrize("straight", [True, False])
def test_an_output_collects_its_later_uses(kind: str, start: int, stop: int, straight: bool) -> None:
    """By differences of the end state in each output, the networks taken for constants."""
    own, found = trajectories(kind)
    window = found.window(start, stop, own).to_window()
    double = tuple(tuple(rows.double() for rows in history) for history in window.histories)
    window = replace(window, states=window.states.double()[..., :2, :2], histories=_corner(double))
    shift = torch.randn(len(window), *window.states.shape[1:], dtype=torch.float64) * 0.1
    calls = count()
    states = roll(lambda x, t: small(x, t, Q) + shift[next(calls)], own, window).states
    frozen = [small(x, own.timesteps[start + k], Q) for k, x in enumerate(states[:-1])]

    def loss(shifts: Tensor) -> Tensor:
        x, history = window.begin, window.history(0)
        for k, output in enumerate(frozen):
            at = states[k] if straight else x
            following, history = own.step(start + k, at, output + shifts[k], history)
            x = x + (following - at) if straight else following
        return (x - window.states[-1]).square().sum() / 2

    # The loss is quadratic in the outputs, so that differences of any size are exact.
    expected = derivative(loss, shift, step=0.1).view_as(shift)
    leaf = shift.clone().requires_grad_()

    def denoise(x: Tensor, t: int) -> Tensor:
        # Which of the steps: an output that has no use in the window is not asked for again.
        place = next(k for k, state in enumerate(states) if torch.equal(state, x))
        return small(x, t, Q) + leaf[place]

    window_loss(denoise, own, window, "identity" if straight else "coefficient")
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-6)
    if kind == "plms":
        assert (expected.flatten(1).norm(dim=1) > 1e-3).all()


def _corner(histories: Any) -> Any:
    return tuple(tuple(rows[..., :2, :2] for rows in history) for history in histories)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_stochastic_sampler_takes_the_noise_of_the_float_trajectory(adjoint: Adjoint) -> None:
    own, window = window_of("ddpm", 1, 4)
    other = replace(window, noises=tuple(-noise for noise in window.noises if noise is not None))
    denoiser = Denoiser(network_of("flat"))
    leaf = torch.zeros((), requires_grad=True)
    with_own, with_other = (
        window_loss(lambda x, t: leaf + denoiser(x, t, {}), own, w, adjoint) for w in (window, other)
    )
    assert float(with_own) < 1e-8
    assert float(with_other) > 1e-3


def test_a_window_may_start_where_the_quantized_model_is() -> None:
    own, window = window_of("ddim", 1, 4)
    moved = replace(window, x=window.states[0] + 0.1)
    assert torch.equal(roll(unet(), own, moved).states[0], window.states[0] + 0.1)
    found = {}
    for adjoint in ("exact", "bptt", "per_step"):
        found[adjoint] = (window_loss(unet(), own, moved, adjoint), gradients(learned()[1].values()))  # type: ignore[arg-type]
    assert distance(found["exact"][1], found["bptt"][1]) < 1e-5
    # Each step alone starts at the float state whatever the window does.
    assert distance(found["per_step"][1], gradient("ddim", 1, 4, "per_step")[1]) == 0


# -- costs, counted ---------------------------------------------------------------------------------------------------

WALKS_FIRST = ("identity", "coefficient", "exact")


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("kind", ["ddim", "plms", "dpm"])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_network_calls_are_as_many_as_it_says(adjoint: Adjoint, kind: str, length: int) -> None:
    own, window = window_of(kind, 1, 1 + length)
    leaf, modes = torch.tensor(0.5, requires_grad=True), []

    def denoise(x: Tensor, t: int) -> Tensor:
        modes.append((torch.is_grad_enabled(), t))
        return leaf * x

    window_loss(denoise, own, window, adjoint)
    # The last step is walked with its graph, and not again.
    assert len(modes) == network_calls(adjoint, length)
    walked = own.timesteps[1:length] if adjoint in WALKS_FIRST else ()
    assert [t for enabled, t in modes if not enabled] == list(walked)
    assert sorted(t for enabled, t in modes if enabled) == sorted(own.timesteps[1 : 1 + length])


@cache
def peaks(adjoint: Adjoint) -> dict[int, int]:
    own = sampler("ddim", 20)
    found = float_trajectories(network_of("flat"), own)
    network, leaves = learned()
    held = {}
    for length in (1, 2, 5, 10, 20):
        window = found.window(0, length, own).to_window()
        known = [*network.parameters(), *network.buffers(), *leaves.values()]
        held[length] = peak_saved_bytes(lambda w=window: window_loss(unet(), own, w, adjoint), without=known)  # type: ignore[misc]
        gradients(leaves.values())
    return held


@pytest.mark.parametrize("adjoint", ["identity", "coefficient", "exact", "per_step"])
def test_the_memory_of_graphs_is_that_of_one_call_whatever_the_length(adjoint: Adjoint) -> None:
    held = peaks(adjoint)
    assert max(held.values()) <= 1.05 * min(held.values()), held
    assert held[20] <= 1.05 * peaks("bptt")[1]


def test_that_of_full_back_propagation_grows_with_the_length() -> None:
    held = peaks("bptt")
    for length in (2, 5, 10, 20):
        assert held[length] == pytest.approx(length * held[1], rel=0.05), held
