"""Checks that ranks calibrate the same network and arrive at the same ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_quant.errors import QuantizationError
from lightning_quant.quantizers import Quantizer
from lightning_quant.utilities.distributed import all_reduce_max, several_ranks

T = TypeVar("T")

# Relative tolerances of FP64 sums: of identical bits, which devices may add in a different order, and of the ranges.
SAME_BITS, SAME_RANGES = 1e-9, 1e-4


def check_weights_agree(network: nn.Module) -> None:
    """Raise an error if ranks hold different parameters, or only shards of them.

    Buffers may differ, since each rank has its own running statistics in training.

    Raises:
        QuantizationError: A tensor differs or is sharded. The message names the first one.

    Example:
        >>> check_weights_agree(nn.Linear(2, 2))
    """
    named = list(network.named_parameters())
    if name := divided_parameter(network):
        raise QuantizationError(
            f"{name} is sharded across ranks, but calibration needs whole weights: calibrate with strategy='ddp' or on"
            " one device."
        )
    remedy = "Set the same seed on all ranks before the module is created, or load the same checkpoint on each rank."
    _check(named, SAME_BITS, remedy)


def divided_parameter(network: nn.Module) -> str:
    """Return the name of the first parameter that FSDP2 has sharded, or an empty string if all are whole.

    Example:
        >>> divided_parameter(nn.Linear(2, 2))
        ''
    """
    # Only DTensor has this attribute, and importing DTensor is slow.
    return next((name for name, parameter in network.named_parameters() if hasattr(parameter, "full_tensor")), "")


def check_quantizers_agree(network: nn.Module) -> None:
    """Raise an error if a range is NaN or infinite, or if the ranges differ between ranks.

    Raises:
        QuantizationError: A range is not finite or differs. The message names the first one.

    Example:
        >>> check_quantizers_agree(nn.Linear(2, 2))
    """
    prefixes = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Quantizer))
    buffers = [(name, buffer) for name, buffer in network.named_buffers() if name.startswith(prefixes)]
    for name, buffer in buffers:
        if not bool(buffer.isfinite().all()):
            raise QuantizationError(
                f"{name} is NaN or infinite after calibration: look for NaN and very large numbers in the weights of"
                f" {name.rsplit('.', 2)[0]!r}, or leave it in float with exclude=[{name.rsplit('.', 2)[0]!r}]."
            )
    _check(
        buffers, SAME_RANGES, "Use the same settings on all ranks and calibrate again: delete the states in cache_dir."
    )


@torch.no_grad()
def _check(named: Sequence[tuple[str, Tensor]], tolerance: float, remedy: str) -> None:
    if not several_ranks() or not named:
        return
    device = named[0][1].device
    sums = torch.stack([part.to(device) for _, tensor in named for part in _summary(tensor)])
    # One collective gives the largest and, negated, the smallest.
    largest, smallest = all_reduce_max(torch.stack([sums, -sums])).mul(sums.new_tensor([[1.0], [-1.0]])).unbind()
    # Relative to the sum of magnitudes, since the signed sum may cancel.
    size = largest.view(-1, 2)[:, :1].clamp_min(1e-30)
    differences = (largest - smallest).view(-1, 2) / size
    for (name, _), values in zip(named, differences.tolist(), strict=True):
        if not max(values) <= tolerance:
            raise QuantizationError(
                f"Rank {dist.get_rank()}: {name} is not the same on all ranks, so they would calibrate different"
                f" networks. {remedy}"
            )


def _summary(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Compute two position-weighted sums of the finite values, which change when the tensor changes."""
    values = tensor.detach().double().flatten().nan_to_num(0.0, 0.0, 0.0)
    position = torch.linspace(1, 2, values.numel(), dtype=torch.float64, device=values.device)
    return (values.abs() * position).sum(), (values * position).sum()
