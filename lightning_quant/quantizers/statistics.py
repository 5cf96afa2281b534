"""Statistics of a tensor over all ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Moments(NamedTuple):
    """Mean, population standard deviation, largest magnitude, and whether any is < 0."""

    mean: float
    std: float
    largest: float
    has_negative: bool


def several_ranks() -> bool:
    """Whether there is anybody to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place; the tensor itself where there is one process."""
    if several_ranks():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Maximum over all ranks, in place; the tensor itself where there is one process."""
    if several_ranks():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gather(values: Tensor) -> Tensor:
    """Concatenation of all ranks' tensors along the first dimension, whose length may differ from rank to rank.

    >>> gather(torch.arange(3))
    tensor([0, 1, 2])
    """
    if not several_ranks():
        return values
    lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(values)], device=values.device))
    counts = [int(length) for length in lengths]
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def moments(x: Tensor) -> Moments:
    """Of the union of all ranks' tensors, in one collective, accumulated in FP64.

    >>> moments(torch.tensor([-1.0, 1.0]))
    Moments(mean=0.0, std=1.0, largest=1.0, has_negative=True)
    """
    values = x.double()
    # A maximum among sums: each rank's in a place of its own.
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if several_ranks() else (1, 0)
    maxima = values.new_zeros(ranks)
    maxima[rank] = values.abs().max() if x.numel() else 0.0
    sums = torch.stack([values.new_tensor(x.numel()), values.sum(), values.square().sum(), (values < 0).sum()])
    count, total, squares, negatives, *largest = all_reduce_sum(torch.cat([sums, maxima])).tolist()
    if count == 0:
        return Moments(0.0, 0.0, 0.0, False)
    mean = total / count
    return Moments(mean, math.sqrt(max(squares / count - mean * mean, 0.0)), max(largest), negatives > 0)
