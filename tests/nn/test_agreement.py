"""Ranks with other weights or ranges are found before they calibrate different networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.processes import on_ranks
from lightning_quant.errors import QuantizationError
from lightning_quant.nn import swap
from lightning_quant.nn.agreement import check_quantizers_agree, check_weights_agree
from lightning_quant.quantizers import FixedQuantizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    quantizer = FixedQuantizer(4, axis=0)
    quantizer.initialize(torch.linspace(-1, 1, 8).view(2, 4))
    swap(net[2], weight_quantizer=quantizer)
    return net


def same(rank: int, ranks: int) -> None:
    net = network()
    # Of the batches of its own.
    net[1].running_mean.add_(rank)  # type: ignore[operator, union-attr]
    check_weights_agree(net)
    check_quantizers_agree(net)


def other_weights(rank: int, ranks: int) -> str:
    net = network()
    if rank == 1:
        with torch.no_grad():
            # The same values in other places.
            net[0].weight.copy_(net[0].weight.flip(1))  # type: ignore[operator, union-attr]
    with pytest.raises(QuantizationError, match="Set the same seed on all ranks") as error:
        check_weights_agree(net)
    return str(error.value)


def turned(rank: int, ranks: int) -> None:
    net = network()
    with torch.no_grad():
        net[0].weight.mul_(1 - 2 * rank)  # type: ignore[operator, union-attr]
    with pytest.raises(QuantizationError, match=r"0\.weight is not the same"):
        check_weights_agree(net)


def a_little_other(rank: int, ranks: int) -> None:
    net = network()
    with torch.no_grad():
        net[0].bias.mul_(1 + 1e-6 * rank)  # type: ignore[operator, union-attr]
    with pytest.raises(QuantizationError, match=r"0\.bias is not the same"):
        check_weights_agree(net)


def other_ranges(rank: int, ranks: int) -> str:
    net = network()
    if rank == 1:
        net[2].weight_quantizer.scale.mul_(1.01)  # type: ignore[operator, union-attr]
    check_weights_agree(net)
    with pytest.raises(QuantizationError, match="calibrate again") as error:
        check_quantizers_agree(net)
    return str(error.value)


def test_the_same_networks_agree() -> None:
    on_ranks(3, same)


@pytest.mark.parametrize("job", [turned, a_little_other])
def test_signs_and_small_differences_are_seen(job: Any) -> None:
    on_ranks(2, job)


def test_other_weights_are_named() -> None:
    for rank, message in enumerate(on_ranks(2, other_weights)):
        assert f"Rank {rank}: 0.weight is not the same on all ranks" in message


def test_other_ranges_are_named() -> None:
    for rank, message in enumerate(on_ranks(2, other_ranges)):
        assert f"Rank {rank}: 2.weight_quantizer.scale is not the same on all ranks" in message
