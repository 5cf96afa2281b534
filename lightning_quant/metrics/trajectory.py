"""How far a quantized denoiser strays from the float one, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError


def accumulated_error(quantized_states: Tensor | Sequence[Tensor], float_states: Tensor | Sequence[Tensor]) -> Tensor:
    """Root mean squared error of the states after each step, both models having run from the same noise.

    Args:
        quantized_states: (N+1, n, C, H, W), from the noise x_0 to the sample x_N, each made from the one before.
        float_states: same shape.

    Returns:
        (N+1,), float64; the first is 0.

    Raises:
        ConfigurationError: different numbers of steps, or shapes.

    Example:
        >>> noise = torch.zeros(1, 1, 2, 2)
        >>> accumulated_error([noise, noise + 1, noise + 3], [noise, noise, noise]).tolist()
        [0.0, 1.0, 3.0]
    """
    return _rmse(quantized_states, float_states)


def single_step_error(predicted_states: Tensor | Sequence[Tensor], float_states: Tensor | Sequence[Tensor]) -> Tensor:
    """Root mean squared error that each step makes by itself, started from the float state.

    Args:
        predicted_states: (N, n, C, H, W), the quantized model's x_{k+1} made from the float model's x_k.
        float_states: (N+1, n, C, H, W).

    Returns:
        (N,), float64.

    Raises:
        ConfigurationError: different numbers of steps, or shapes.

    Example:
        >>> states = torch.zeros(3, 1, 1, 2, 2)
        >>> single_step_error(states[1:] + 2, states).tolist()
        [2.0, 2.0]
    """
    return _rmse(predicted_states, float_states[1:])


def _rmse(states: Tensor | Sequence[Tensor], reference: Tensor | Sequence[Tensor]) -> Tensor:
    if len(states) != len(reference):
        raise ConfigurationError(
            f"{len(states)} states against {len(reference)}: one for each step of the same trajectory, and N + 1"
            " float states."
        )
    return torch.stack([_rmse_of(x, y) for x, y in zip(states, reference, strict=True)])


def _rmse_of(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        raise ConfigurationError(f"A state {tuple(x.shape)} against one of {tuple(y.shape)}: expected the same images.")
    return (x.double() - y.double()).square().mean().sqrt()
