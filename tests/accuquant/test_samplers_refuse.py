"""Samplers: what is refused, and what the message says to write instead."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch

from lightning_quant.accuquant.samplers import SUPPORTED, sampler_of
from lightning_quant.errors import ConfigurationError, UnsupportedModelError


@pytest.mark.parametrize("found", [diffusers.EulerDiscreteScheduler(), diffusers.UniPCMultistepScheduler(), "ddim"])
def test_another_scheduler(found: Any) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        sampler_of(found, 10)
    message = str(error.value)
    assert message.startswith(type(found).__name__)
    assert all(name in message for name in SUPPORTED)
    assert "scheduler = DDIMScheduler.from_config(scheduler.config)" in message


def test_a_class_of_the_same_name_that_is_not_the_one_of_diffusers() -> None:
    stranger = type("DDIMScheduler", (), {"__module__": "somewhere"})()
    with pytest.raises(UnsupportedModelError, match="DDIMScheduler is not a supported scheduler"):
        sampler_of(stranger, 10)


def test_a_subclass_with_its_own_step() -> None:
    class Own(diffusers.DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(UnsupportedModelError, match=r"Own overrides the step of DDIMScheduler.*from_config"):
        sampler_of(Own(), 10)


@pytest.mark.parametrize(
    ("scheduler", "known"),
    [
        (diffusers.DDIMScheduler, "'epsilon', 'sample', 'v_prediction'"),
        (diffusers.DDPMScheduler, "'epsilon', 'sample', 'v_prediction'"),
        (diffusers.PNDMScheduler, "'epsilon', 'v_prediction'"),
        (diffusers.DPMSolverMultistepScheduler, "'epsilon', 'sample', 'v_prediction'"),
    ],
)
def test_an_unknown_prediction_type(scheduler: Any, known: str) -> None:
    expected = f"prediction_type='flow_prediction' of {scheduler.__name__} is not supported"
    with pytest.raises(ConfigurationError, match=f"{expected}.*expected {known}: write the one"):
        sampler_of(scheduler(prediction_type="flow_prediction"), 10)


@pytest.mark.parametrize(
    ("scheduler", "why", "write"),
    [
        (diffusers.DDIMScheduler(thresholding=True), "quantile of each image", "thresholding=False"),
        (diffusers.DDPMScheduler(thresholding=True), "quantile of each image", "thresholding=False"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "further channels", "variance_type='fixed_small'"),
        (diffusers.DDPMScheduler(variance_type="learned"), "further channels", "variance_type='fixed_small'"),
        (diffusers.DDPMScheduler(variance_type="fixed_large_log"), "NaN", "variance_type='fixed_small'"),
        (diffusers.DPMSolverMultistepScheduler(solver_order=3), "expected 2, 1", "solver_order=2"),
        (
            diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
            "expected 'dpmsolver++'",
            "algorithm_type='dpmsolver++'",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(variance_type="learned_range"),
            "further channels",
            "variance_type=None",
        ),
    ],
)
def test_an_option_that_the_step_does_not_know(scheduler: Any, why: str, write: str) -> None:
    name = type(scheduler).__name__
    with pytest.raises(ConfigurationError) as error:
        sampler_of(scheduler, 10)
    assert why in str(error.value)
    assert f"write scheduler = {name}.from_config(scheduler.config, {write})" in str(error.value)


def test_an_option_that_only_newer_releases_of_diffusers_have() -> None:
    scheduler: Any = diffusers.DPMSolverMultistepScheduler()
    scheduler.register_to_config(use_flow_sigmas=True)
    with pytest.raises(ConfigurationError, match=r"use_flow_sigmas=True of .*expected False.*use_flow_sigmas=False\)"):
        sampler_of(scheduler, 10)


def test_what_the_message_says_to_write_is_accepted() -> None:
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=2)
    assert sampler_of(scheduler, 10).history == 1


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"steps={steps}: expected 1 .. 1000, .*DDIMScheduler"):
        sampler_of(diffusers.DDIMScheduler(), steps)


def test_too_few_steps_for_runge_kutta() -> None:
    with pytest.raises(ConfigurationError, match=r"steps=3: expected 4 \.\. 1000.*skip_prk_steps=True from 1"):
        sampler_of(diffusers.PNDMScheduler(), 3)


def test_timesteps_beyond_those_of_training() -> None:
    with pytest.raises(
        ConfigurationError, match=r"asks for timestep 1000, expected 0 \.\. 999.*steps_offset \(found 1"
    ):
        sampler_of(diffusers.DDIMScheduler(steps_offset=1), 1000)


def test_an_unknown_spacing() -> None:
    with pytest.raises(ConfigurationError, match=r"DDIMScheduler has no timesteps for steps=5: .*sideways"):
        sampler_of(diffusers.DDIMScheduler(timestep_spacing="sideways"), 5)


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_eta_out_of_range(eta: float) -> None:
    with pytest.raises(ConfigurationError, match=f"eta={eta}: expected a number from 0"):
        sampler_of(diffusers.DDIMScheduler(), 5, eta)


def test_an_eta_with_more_noise_than_a_step_can_hold() -> None:
    with pytest.raises(ConfigurationError, match=r"eta=5.0 asks for more noise than the step allows: write eta=1.0"):
        sampler_of(diffusers.DDIMScheduler(), 5, 5.0)


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.DDPMScheduler(), diffusers.PNDMScheduler(), diffusers.DPMSolverMultistepScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_eta_without_ddim(scheduler: Any) -> None:
    expected = f"eta=0.5 belongs to DDIM, found {type(scheduler).__name__}: write eta=0.0"
    with pytest.raises(ConfigurationError, match=expected):
        sampler_of(scheduler, 5, eta=0.5)


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
def test_epsilon_where_nothing_of_the_image_is_left(scheduler: Any) -> None:
    made = scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(
        ConfigurationError, match=r"'epsilon' does not determine the image at timestep 999.*v_prediction"
    ):
        sampler_of(made, 5)


def test_two_steps_of_the_same_sigma() -> None:
    made = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading", final_sigmas_type="sigma_min")
    with pytest.raises(ConfigurationError, match="the same sigma: write fewer steps"):
        sampler_of(made, 1000)


def test_noise_that_is_missing() -> None:
    x = torch.zeros(2, 3, 4, 4)
    expected = re.escape(
        "step(0) at timestep 800 adds noise, found noise=None: pass a standard normal tensor of shape (2, 3"
    )
    with pytest.raises(ConfigurationError, match=expected):
        sampler_of(diffusers.DDPMScheduler(), 5).step(0, x, x)


@pytest.mark.parametrize(
    ("scheduler", "k", "carried", "found"),
    [
        (diffusers.PNDMScheduler(skip_prk_steps=True), 1, 2, 0),
        (diffusers.DPMSolverMultistepScheduler(), 1, 1, 0),
        (diffusers.DDIMScheduler(), 0, 0, 1),
    ],
)
def test_a_history_of_another_step(scheduler: Any, k: int, carried: int, found: int) -> None:
    x = torch.zeros(2, 3, 4, 4)
    expected = re.escape(f"step({k}) expects {carried} tensors in its history, found {found}: pass the history that")
    with pytest.raises(ConfigurationError, match=expected):
        sampler_of(scheduler, 5).step(k, x, x, (x,) * found)
