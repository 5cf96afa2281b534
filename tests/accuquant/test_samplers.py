"""Samplers: the chain of diffusers, pure, differentiable, and with a history that can be looked up."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import cache, partial
from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from lightning_quant.accuquant.samplers import DPMSolverSampler, History, PNDMSampler, Sampler, sampler_of

SHAPE = (2, 3, 8, 8)
DDIM: Any = diffusers.DDIMScheduler
DDPM: Any = diffusers.DDPMScheduler
PLMS: Any = partial(diffusers.PNDMScheduler, skip_prk_steps=True)
PRK: Any = partial(diffusers.PNDMScheduler, skip_prk_steps=False)
DPM: Any = diffusers.DPMSolverMultistepScheduler

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
# Stable Diffusion's betas, those of DDPM, and the cosine, whose last ones are close to 1.
BETAS: tuple[dict[str, Any], ...] = (
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
)


def network(x: Tensor, t: int) -> Tensor:
    """Bounded, and different at each timestep and pixel."""
    return torch.tanh(0.7 * x.roll(1, -1) - 0.3 * x + t / 1000) * 1.3


def chain_noise(steps: int) -> Tensor:
    return torch.randn(steps, *SHAPE, generator=torch.Generator().manual_seed(7))


def first_state() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def rollout(sampler: Sampler) -> tuple[Tensor, Tensor, list[History]]:
    """States, outputs and histories along a chain."""
    noise = chain_noise(len(sampler.timesteps))
    states, outputs, histories = [first_state()], [], [sampler.start()]
    for k, t in enumerate(sampler.timesteps):
        outputs.append(network(states[k], t))
        x, history = sampler.step(k, states[k], outputs[k], histories[k], noise[k] if sampler.draws(k) else None)
        states.append(x)
        histories.append(history)
    return torch.stack(states), torch.stack(outputs), histories


def diffusers_chain(scheduler: Any, steps: int, eta: float, patch: pytest.MonkeyPatch) -> Tensor:
    """States along the chain that diffusers itself takes, with the noise of :func:`rollout`."""
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, DPM):
        scheduler.set_begin_index(0)  # as pipelines do: Karras' timesteps repeat, and cannot be searched for
    noise, states = chain_noise(len(scheduler.timesteps)), [first_state()]
    for k, t in enumerate(scheduler.timesteps):
        patch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, k=k, **__: noise[k])
        extra = {"eta": eta, "variance_noise": noise[k]} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
        states.append(scheduler.step(network(states[k], int(t)), t, states[k], **extra).prev_sample)
    return torch.stack(states)


def assert_equals_diffusers(scheduler: Any, steps: int, eta: float, patch: pytest.MonkeyPatch) -> None:
    found = rollout(sampler_of(scheduler, steps, eta))[0]
    expected = diffusers_chain(scheduler, steps, eta, patch)
    assert len(found) == len(expected)
    assert expected.isfinite().all()
    error = (found - expected).abs().amax(dim=(1, 2, 3, 4)) / expected.abs().amax(dim=(1, 2, 3, 4))
    assert float(error.max()) <= 1e-6


@pytest.mark.parametrize(("betas", "spacing"), list(product(BETAS, SPACINGS)))
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("scheduler", [DDIM, DDPM])
def test_a_single_step_chain_equals_diffusers(
    scheduler: Any,
    clip_sample: bool,
    prediction_type: str,
    betas: dict[str, Any],
    spacing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = scheduler(
        **betas,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        clip_sample=clip_sample,
        clip_sample_range=0.8,
    )
    assert_equals_diffusers(made, 7, 0.5 if scheduler is DDIM else 0.0, monkeypatch)


@pytest.mark.parametrize(("betas", "spacing"), list(product(BETAS, SPACINGS)))
@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [*product((PLMS, PRK), ("epsilon", "v_prediction")), *product((DPM,), PREDICTIONS)],
)
def test_a_multistep_chain_equals_diffusers(
    scheduler: Any, prediction_type: str, betas: dict[str, Any], spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scheduler(**betas, timestep_spacing=spacing, prediction_type=prediction_type)
    assert_equals_diffusers(made, 9, 0.0, monkeypatch)


@pytest.mark.parametrize(("steps", "eta"), [*product((1, 2, 3, 50), (0.0, 0.3, 1.0)), (1000, 1.0)])
def test_ddim_at_any_length_and_eta(steps: int, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for last in (True, False):
        assert_equals_diffusers(DDIM(set_alpha_to_one=last), steps, eta, monkeypatch)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_with_every_fixed_variance(variance_type: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = DDPM(variance_type=variance_type, timestep_spacing=spacing)
    for steps in (1, 13, 200):
        assert_equals_diffusers(made, steps, 0.0, monkeypatch)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("scheduler", [DDIM, DDPM])
def test_a_zero_terminal_snr(scheduler: Any, prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction_type)
    assert sampler_of(made, 8).timesteps[0] == 999
    assert_equals_diffusers(made, 8, 0.0, monkeypatch)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 50])
@pytest.mark.parametrize("options", [{"set_alpha_to_one": True}, {"steps_offset": 1}])
def test_pndm_at_any_length(steps: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equals_diffusers(PLMS(**options), steps, 0.0, monkeypatch)
    if steps >= 4:
        assert_equals_diffusers(PRK(**options), steps, 0.0, monkeypatch)


@pytest.mark.parametrize("steps", [1, 2, 14, 15, 40])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver_order": 1},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min", "timestep_spacing": "leading"},
        {"final_sigmas_type": "sigma_min"},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {"use_lu_lambdas": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    ],
    ids=lambda options: ",".join(options),
)
def test_dpm_solver_with_every_way_to_end(
    steps: int, solver_type: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = DPM(solver_type=solver_type, **options)
    assert_equals_diffusers(made, steps, 0.0, monkeypatch)


MANY: dict[str, tuple[Any, int, float]] = {
    "ddim": (DDIM(clip_sample=False), 5, 0.0),
    "ddim eta": (DDIM(clip_sample=False, prediction_type="v_prediction"), 5, 1.0),
    "ddim clip": (DDIM(prediction_type="sample"), 5, 0.0),
    "ddpm": (DDPM(), 5, 0.0),
    "plms": (PLMS(), 8, 0.0),
    "plms v": (PLMS(prediction_type="v_prediction"), 8, 0.0),
    "prk": (PRK(prediction_type="v_prediction"), 6, 0.0),
    "dpm": (DPM(), 6, 0.0),
    "dpm heun": (DPM(solver_type="heun", final_sigmas_type="sigma_min", lower_order_final=False), 6, 0.0),
    "dpm v": (DPM(prediction_type="v_prediction", use_karras_sigmas=True), 6, 0.0),
}
every_sampler = pytest.mark.parametrize("name", MANY)


@cache
def made(name: str) -> Sampler:
    scheduler, steps, eta = MANY[name]
    return sampler_of(scheduler, steps, eta)


@every_sampler
def test_the_history_can_be_looked_up_in_a_chain(name: str) -> None:
    sampler = made(name)
    states, outputs, histories = rollout(sampler)
    for k, history in enumerate(histories):
        found = sampler.history_at(k, states[:k], outputs[:k])
        assert len(found) == len(history) == sampler.carried(k)
        assert all(torch.equal(a, b) for a, b in zip(found, history, strict=True))
    assert histories[0] == histories[-1] == ()


@every_sampler
def test_a_step_depends_on_its_arguments_alone(name: str) -> None:
    sampler = made(name)
    states, outputs, _ = rollout(sampler)
    noise = chain_noise(len(outputs))
    for k in reversed(range(len(outputs))):
        x, _ = sampler.step(k, states[k], outputs[k], sampler.history_at(k, states, outputs), noise[k])
        assert torch.equal(x, states[k + 1])


@every_sampler
def test_a_step_is_differentiable_in_all_that_it_takes(name: str) -> None:
    sampler = made(name)
    states, outputs, histories = rollout(sampler)
    noise = chain_noise(len(outputs)).double()
    for k in range(len(outputs)):
        # A few pixels are enough: the step works on each alone.
        given = [t[..., :2, :2].double().clone().requires_grad_() for t in (states[k], outputs[k], *histories[k])]

        def step(x: Tensor, output: Tensor, *history: Tensor, k: int = k) -> tuple[Tensor, ...]:
            following, carried = sampler.step(k, x, output, history, noise[k, ..., :2, :2])
            return following, *carried

        assert torch.autograd.gradcheck(step, given)


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    sampler = made(name)
    states, outputs, histories = rollout(sampler)
    noise = chain_noise(len(outputs))
    for k, history in enumerate(histories[:-1]):
        carried = tuple(t.to(dtype) for t in history)
        x, following = sampler.step(k, states[k].to(dtype), outputs[k].to(dtype), carried, noise[k])
        assert {t.dtype for t in (x, *following)} == {dtype}


@every_sampler
def test_a_gradient_through_the_histories_is_the_one_through_the_chain(name: str) -> None:
    """Backwards one step at a time, as an adjoint goes, and through all of them at once."""
    sampler = made(name)
    states, outputs, _ = rollout(sampler)
    noise, count = chain_noise(len(outputs)), len(outputs)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    x, history = states[0].double(), sampler.start()
    for k, t in enumerate(sampler.timesteps):
        x, history = sampler.step(k, x, scale * network(x, t), history, noise[k])
    (expected,) = torch.autograd.grad(x.square().sum(), scale)

    gradients: list[Tensor] = [2 * x.detach()]
    total = torch.zeros((), dtype=torch.float64)
    points: list[tuple[Tensor, ...]] = [(states[0].double(),)]
    for k, t in enumerate(sampler.timesteps):
        at, *carried = points[k]
        following, after = sampler.step(k, at, network(at, t), tuple(carried), noise[k])
        points.append((following, *after))
    for k in reversed(range(count)):
        x, *carried = (t.detach().requires_grad_() for t in points[k])
        following, after = sampler.step(k, x, scale * network(x, sampler.timesteps[k]), tuple(carried), noise[k])
        found = torch.autograd.grad(
            (following, *after), [scale, x, *carried], gradients, allow_unused=True, materialize_grads=True
        )
        total, gradients = total + found[0], list(found[1:])
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "history", "carried"),
    [
        ("ddim", 0, [0] * 6),
        ("ddpm", 0, [0] * 6),
        ("plms", 3, [0, 2, 1, 2, 3, 3, 3, 3, 3, 0]),
        ("prk", 3, [0, 2, 3, 4, 1, 3, 4, 5, 2, 4, 5, 6, 3, 3, 3, 0]),
        ("dpm", 1, [0, 1, 1, 1, 1, 0, 0]),
        ("dpm heun", 1, [0, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_what_is_carried_along(name: str, history: int, carried: list[int]) -> None:
    sampler = made(name)
    assert sampler.history == history
    assert [sampler.carried(k) for k in range(len(sampler.timesteps) + 1)] == carried


def test_a_first_order_solver_carries_nothing() -> None:
    sampler = sampler_of(DPM(solver_order=1), 20)
    assert (sampler.history, max(sampler.carried(k) for k in range(21))) == (0, 0)


def test_plms_calls_the_network_once_more_than_it_has_steps() -> None:
    sampler = sampler_of(PLMS(), 10)
    assert len(sampler.timesteps) == 11
    assert sampler.timesteps[1] == sampler.timesteps[2]


def test_the_second_step_of_plms_starts_at_the_first_state_again() -> None:
    sampler = made("plms")
    states, outputs, histories = rollout(sampler)
    somewhere_else = torch.full_like(states[1], 100.0)
    assert torch.equal(sampler.step(1, somewhere_else, outputs[1], histories[1])[0], states[2])


@pytest.mark.parametrize("name", ["ddpm", "ddim eta"])
def test_the_last_step_adds_no_noise(name: str) -> None:
    sampler = made(name)
    last = len(sampler.timesteps) - 1
    assert sampler.timesteps[last] == 0
    assert [sampler.draws(k) for k in range(last + 1)] == [True] * last + [False]
    x, output = first_state(), network(first_state(), 0)
    without, _ = sampler.step(last, x, output)
    assert torch.equal(sampler.step(last, x, output, (), torch.full_like(x, torch.nan))[0], without)
    assert sampler.stochastic


@pytest.mark.parametrize("name", ["ddim", "plms", "prk", "dpm"])
def test_a_deterministic_sampler_draws_nowhere(name: str) -> None:
    sampler = made(name)
    assert not sampler.stochastic
    assert not any(sampler.draws(k) for k in range(len(sampler.timesteps)))


def test_ddpm_draws_at_the_end_where_its_last_timestep_is_not_0() -> None:
    sampler = sampler_of(DDPM(timestep_spacing="trailing", variance_type="fixed_large"), 10)
    assert sampler.timesteps[-1] == 99
    assert sampler.draws(9)


@every_sampler
def test_the_scheduler_is_left_as_it_is(name: str) -> None:
    scheduler, steps, eta = MANY[name]
    scheduler.set_timesteps(steps + 1)
    before = pickle.dumps(scheduler)
    rollout(sampler_of(scheduler, steps, eta))
    assert pickle.dumps(scheduler) == before


@every_sampler
def test_a_sampler_survives_pickling(name: str) -> None:
    sampler = made(name)
    again = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(rollout(again)[0], rollout(sampler)[0])
    assert again.describe() == sampler.describe()


def test_the_description_tells_apart_what_computes_differently() -> None:
    described = [
        json.dumps(sampler_of(scheduler, steps, eta).describe(), sort_keys=True)
        for scheduler, steps, eta in (
            *MANY.values(),
            (DDIM(clip_sample=False), 6, 0.0),
            (DDIM(clip_sample=True), 5, 0.0),
            (DDIM(clip_sample=False), 5, 0.5),
            (DDIM(clip_sample=False, beta_end=0.03), 5, 0.0),
            (DDIM(clip_sample=False, set_alpha_to_one=False), 5, 0.0),
            (DDIM(clip_sample=False, trained_betas=[0.01] * 1000), 5, 0.0),
            (DDPM(variance_type="fixed_large"), 5, 0.0),
            (DPM(solver_order=1), 6, 0.0),
            (DPM(solver_type="heun"), 6, 0.0),
            (DPM(use_karras_sigmas=True), 6, 0.0),
        )
    ]
    assert len(set(described)) == len(described)


def test_the_description_is_that_of_an_equal_scheduler() -> None:
    again = DDIM.from_config(DDIM(clip_sample=False).config)
    assert sampler_of(again, 5).describe() == made("ddim").describe()


def test_the_table_is_the_schedulers_own() -> None:
    """One changed by hand is taken, and not made anew from the configuration."""
    scheduler = DDIM(clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    x = first_state()
    found, _ = sampler_of(scheduler, 5).step(0, x, network(x, 800))
    scheduler.set_timesteps(5)
    torch.testing.assert_close(found, scheduler.step(network(x, 800), 800, x).prev_sample, rtol=1e-6, atol=1e-6)


def test_a_subclass_that_keeps_the_step_is_taken() -> None:
    class Renamed(diffusers.DDIMScheduler):
        pass

    assert sampler_of(Renamed(), 4).timesteps == (750, 500, 250, 0)


def test_kinds_of_samplers() -> None:
    assert isinstance(made("plms"), PNDMSampler)
    assert isinstance(made("dpm"), DPMSolverSampler)


def test_diffusers_is_not_imported_with_the_module() -> None:
    code = "import sys, lightning_quant.accuquant.samplers; print('diffusers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
