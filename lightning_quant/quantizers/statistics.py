"""Statistics of a tensor across ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.utilities.distributed import all_reduce_sum, rank_and_ranks


class Moments(NamedTuple):
    """Mean, population standard deviation, largest magnitude, and whether any value is negative."""

    mean: float
    std: float
    largest: float
    has_negative: bool


def moments(x: Tensor) -> Moments:
    """Compute the moments of the union of all ranks' tensors in one collective, accumulated in FP64.

    Example:
        >>> moments(torch.tensor([-1.0, 1.0]))
        Moments(mean=0.0, std=1.0, largest=1.0, has_negative=True)
    """
    values = x.double()
    # To get a maximum from a sum, each rank writes its own to a separate slot.
    rank, ranks = rank_and_ranks()
    maxima = values.new_zeros(ranks)
    maxima[rank] = values.abs().max() if x.numel() else 0.0
    sums = torch.stack([values.new_tensor(x.numel()), values.sum(), values.square().sum(), (values < 0).sum()])
    count, total, squares, negatives, *largest = all_reduce_sum(torch.cat([sums, maxima])).tolist()
    if count == 0:
        return Moments(0.0, 0.0, 0.0, False)
    mean = total / count
    return Moments(mean, math.sqrt(max(squares / count - mean * mean, 0.0)), max(largest), negatives > 0)
