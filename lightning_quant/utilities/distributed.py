"""Collectives that do nothing where there is one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_quant.errors import QuantizationError

T = TypeVar("T")


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
    """What a job returns, when it is done on all ranks: one that fails does not leave the others waiting.

    Args:
        job: of this rank, in which ranks do not wait for one another.
        device: where ranks exchange tensors.
        what: the job, in words that follow "could not".

    Raises:
        QuantizationError: another rank failed; this one's own failure is raised as it is.

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
    """What each rank has, on rank 0; nothing elsewhere. As objects: a rank may have no images, and no columns."""
    if not several_ranks():
        return [mine]
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, found, dst=0)
    return found or []


def on_first_rank(work: Callable[[], T]) -> T:
    """What the work gives, or raises, on rank 0, on every rank; the others wait."""
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
