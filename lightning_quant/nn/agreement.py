"""Ranks that calibrate together must hold the same network, and come to the same ranges."""

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

# Of sums in FP64: over the same bits, on devices that may add them in another order, and over what was computed.
SAME_BITS, SAME_RANGES = 1e-9, 1e-4


def check_weights_agree(network: nn.Module) -> None:
    """Stop where ranks hold other parameters, or only pieces of them.

    Buffers may differ: each rank of a training has running statistics of its own.

    Raises:
        QuantizationError: with the name of the first tensor that is not the same, or not whole.

    Example:
        >>> check_weights_agree(nn.Linear(2, 2))
    """
    named = list(network.named_parameters())
    if name := divided_parameter(network):
        raise QuantizationError(
            f"{name} is divided among ranks, and a calibration needs whole weights: calibrate with strategy='ddp',"
            " or on one device."
        )
    remedy = "Seed all ranks alike before the module is made, or load the same checkpoint on each."
    _check(named, SAME_BITS, remedy)


def divided_parameter(network: nn.Module) -> str:
    """Name of the first parameter of which this rank has only a piece, as FSDP2 leaves it; empty where all are whole.

    Example:
        >>> divided_parameter(nn.Linear(2, 2))
        ''
    """
    # Only a DTensor has this, and importing it takes time.
    return next((name for name, each in network.named_parameters() if hasattr(each, "full_tensor")), "")


def check_quantizers_agree(network: nn.Module) -> None:
    """Stop where a range is NaN or infinite, or the quantizers of ranks have come to other ranges.

    Raises:
        QuantizationError: with the name of the first one.

    Example:
        >>> check_quantizers_agree(nn.Linear(2, 2))
    """
    prefixes = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Quantizer))
    buffers = [(name, buffer) for name, buffer in network.named_buffers() if name.startswith(prefixes)]
    for name, buffer in buffers:
        if not bool(buffer.isfinite().all()):
            raise QuantizationError(
                f"{name} is NaN or infinite after the calibration: look for NaN and very large numbers in the weights"
                f" of {name.rsplit('.', 2)[0]!r}, or leave it in float with exclude=[{name.rsplit('.', 2)[0]!r}]."
            )
    _check(
        buffers, SAME_RANGES, "Give all ranks the same settings, and calibrate anew: delete the states in cache_dir."
    )


@torch.no_grad()
def _check(named: Sequence[tuple[str, Tensor]], tolerance: float, remedy: str) -> None:
    if not several_ranks() or not named:
        return
    device = named[0][1].device
    own = torch.stack([part.to(device) for _, tensor in named for part in _summary(tensor)])
    # The largest and, negated, the smallest, in one collective.
    largest, smallest = all_reduce_max(torch.stack([own, -own])).mul(own.new_tensor([[1.0], [-1.0]])).unbind()
    # Relative to the size of the values: those with their signs may cancel.
    size = largest.view(-1, 2)[:, :1].clamp_min(1e-30)
    apart = (largest - smallest).view(-1, 2) / size
    for (name, _), values in zip(named, apart.tolist(), strict=True):
        if not max(values) <= tolerance:
            raise QuantizationError(
                f"Rank {dist.get_rank()}: {name} is not the same on all ranks, which would calibrate different"
                f" networks. {remedy}"
            )


def _summary(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums that a change of the tensor changes; where it is not finite, of the numbers that are."""
    values = tensor.detach().double().flatten().nan_to_num(0.0, 0.0, 0.0)
    position = torch.linspace(1, 2, values.numel(), dtype=torch.float64, device=values.device)
    return (values.abs() * position).sum(), (values * position).sum()
