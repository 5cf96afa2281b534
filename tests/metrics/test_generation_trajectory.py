"""Errors over the steps, by hand, and what is refused."""

import pytest
import torch

from lightning_quant.errors import ConfigurationError
from lightning_quant.metrics import accumulated_error, single_step_error


def test_errors_are_root_mean_squares_over_all_values_of_a_step() -> None:
    states, noise = torch.randn(5, 3, 2, 4, 4), torch.randn(5, 3, 2, 4, 4)
    noise[0] = 0
    expected = [float((step.double() ** 2).sum() / step.numel()) ** 0.5 for step in noise]
    assert accumulated_error(states + noise, states).tolist() == pytest.approx(expected, rel=1e-5)
    assert single_step_error(states[1:] + noise[1:], states).tolist() == pytest.approx(expected[1:], rel=1e-5)
    assert accumulated_error(states, states).tolist() == [0.0] * 5


def test_states_given_one_by_one_are_the_same() -> None:
    x, y = torch.randn(2, 4, 3, 1, 2, 2)
    torch.testing.assert_close(accumulated_error(list(x), tuple(y)), accumulated_error(x, y))
    torch.testing.assert_close(single_step_error(list(x[1:]), tuple(y)), single_step_error(x[1:], y))


def test_states_that_do_not_belong_together() -> None:
    states = torch.zeros(4, 2, 1, 2, 2)
    with pytest.raises(ConfigurationError, match="3 states against 4"):
        accumulated_error(states[1:], states)
    with pytest.raises(ConfigurationError, match="4 states against 3"):
        single_step_error(states, states)
    with pytest.raises(ConfigurationError, match=r"\(1, 1, 2, 2\) against one of \(2, 1, 2, 2\)"):
        accumulated_error(states[:, :1], states)
