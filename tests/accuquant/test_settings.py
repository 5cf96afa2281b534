"""What is chosen is checked before anything starts, and refused with what to write instead."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.accuquant.settings import Settings, usual_window, windows_of
from lightning_quant.errors import ConfigurationError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, r"weight_bits=1: expected a whole number from 2 to 16, for example weight_bits=4"),
        ({"activation_bits": 32}, r"activation_bits=32: expected a whole number from 2 to 16"),
        ({"first_and_last_bits": "8"}, r"first_and_last_bits='8': expected a whole number from 2 to 16"),
        ({"softmax_bits": 17}, r"softmax_bits=17: expected a whole number from 2 to 16"),
        ({"steps": 0}, r"steps=0: expected a whole number of at least 1"),
        ({"steps": 20.0}, r"steps=20\.0: expected a whole number of at least 1"),
        ({"batch_size": 0}, r"batch_size=0: expected a whole number of at least 1"),
        ({"trajectories": -1}, r"trajectories=-1: expected a whole number of at least 1"),
        ({"held_out": 0}, r"held_out=0: expected a whole number of at least 1"),
        ({"check_every": 0}, r"check_every=0: expected a whole number of at least 1"),
        ({"patience": 0}, r"patience=0: expected a whole number of at least 1"),
        ({"updates": -1}, r"updates=-1: expected a whole number of at least 0"),
        ({"reconstruction": -5}, r"reconstruction=-5: expected a whole number of at least 0"),
        (
            {"batch_size": 32, "trajectories": 16},
            r"batch_size=32 with trajectories=16: a batch is drawn from the trajectories, write trajectories=32",
        ),
        ({"rounding_lr": 0.0}, r"rounding_lr=0\.0: expected a positive number"),
        ({"activation_lr": -1e-3}, r"activation_lr=-0\.001: expected a positive number"),
        ({"rounding_lr": float("nan")}, r"rounding_lr=nan: expected a positive number"),
        (
            {"adjoint": "none"},
            r"adjoint='none': expected one of 'identity', 'coefficient', 'exact', 'bptt', 'per_step'",
        ),
        ({"start": "quantized"}, r"start='quantized': expected one of 'float', 'prefix'"),
        ({"activation_parameters": "each"}, r"activation_parameters='each': expected one of 'shared', 'per_group'"),
        ({"learn": "weights"}, r"learn='weights': expected one of 'all', 'rounding', 'activations'"),
        (
            {"window": "auto"},
            r"window='auto': expected a number of steps, 'sweep', or None for the default of 5 with 50",
        ),
        ({"window": 0}, r"window=0: expected a number of steps, 'sweep', or None for the default of 5 with 50"),
        ({"window": 2.5, "steps": 20}, r"window=2\.5: expected a number of .* None for the default of 4 with 20 steps"),
        (
            {"window": 21, "steps": 20},
            r"window=21 is longer than the trajectory of 20 steps: write window=4, or leave it out",
        ),
    ],
)
def test_what_is_out_of_range_is_refused_with_what_to_write(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Settings(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 20, "steps": 20},
        {"window": 1, "steps": 1},
        {"window": "sweep"},
        {"updates": 0},
        {"batch_size": 16, "trajectories": 16},
        {"learn": "activations"},
    ],
)
def test_what_is_at_the_edge_is_taken(arguments: dict[str, Any]) -> None:
    settings = Settings(**arguments)
    assert all(getattr(settings, name) == value for name, value in arguments.items())


def test_as_plain_values_they_are_json_and_make_the_same_again() -> None:
    settings = Settings(3, 6, window=2, exclude=("conv_in", "*.attn2"), guidance=3.0)
    values = json.loads(json.dumps(settings.as_dict()))
    assert Settings(**{**values, "exclude": tuple(values["exclude"])}) == settings


def test_different_settings_have_different_values() -> None:
    base = Settings().as_dict()
    changed: dict[str, Any] = {"weight_bits": 3, "window": 3, "learn": "rounding", "exclude": ("a",), "guidance": 2.0}
    for name, value in changed.items():
        assert Settings(**{name: value}).as_dict() != base


@given(st.integers(1, 1000))
def test_the_usual_window_is_short_and_fits(steps: int) -> None:
    window = usual_window(steps)
    assert min(steps, 4) <= window <= steps
    assert usual_window(steps) <= usual_window(steps + 1)
    if steps >= 40:
        assert steps / 25 <= window <= steps / 10


@given(st.integers(1, 200), st.integers(1, 250))
def test_windows_cover_each_step_once_in_order(steps: int, window: int) -> None:
    windows = windows_of(steps, window)
    assert [step for each in windows for step in each] == list(range(steps))
    assert all(len(each) == window for each in windows[:-1])
    assert 1 <= len(windows[-1]) <= window
