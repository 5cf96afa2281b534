"""Collectives that do nothing in a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_quant.errors import QuantizationError

T = TypeVar("T")


def several_ranks() -> bool:
    """Return whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_ranks() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks.

    Example:
        >>> rank_and_ranks()
        (0, 1)
    """
    return (dist.get_rank(), dist.get_world_size()) if several_ranks() else (0, 1)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks in place, and return the tensor."""
    if several_ranks():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Take the maximum over all ranks in place, and return the tensor."""
    if several_ranks():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def gather(values: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension, whose length may differ between ranks.

    Example:
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


def on_all_ranks(job: Callable[[], T], device: torch.device, what: str) -> T:
    """Run a job on all ranks and return its result. If one rank fails, the others raise an error instead of hanging.

    Args:
        job: Function of this rank, without collectives.
        device: Device for the exchange between ranks.
        what: Description of the job that follows "could not" in the error message.

    Raises:
        QuantizationError: Another rank failed. A failure of this rank is raised unchanged.

    Example:
        >>> on_all_ranks(lambda: 3, torch.device("cpu"), "count")
        3
    """
    failure: Exception | None = None
    try:
        result = job()
    except Exception as error:
        failure = error
    failed = int(all_reduce_sum(torch.tensor([int(failure is not None)], device=device)))
    if failure is not None:
        raise failure
    if failed:
        raise QuantizationError(f"{failed} other ranks could not {what}: see their errors.")
    return result


def gather_objects(mine: T) -> list[T]:
    """Gather one object from each rank on rank 0; other ranks get an empty list.

    Objects rather than tensors, since a rank without images does not know the number of columns.
    """
    if not several_ranks():
        return [mine]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    return gathered or []


def on_first_rank(work: Callable[[], T]) -> T:
    """Run a function on rank 0 only, and return its result or raise its error on every rank."""
    if not several_ranks():
        return work()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]  # type: ignore[no-any-return]
