"""Elementwise operations in blocks that fit in the L2 cache of a CPU.

A chain of elementwise operations on a large tensor is bound by memory bandwidth: each one reads and writes all of it.
Block by block, only the first operation reads main memory and only the last one writes it, which is 2-3x faster. On
other devices the whole tensor is one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**18
SAMPLE = 2**10


def is_dense(x: Tensor) -> bool:
    """Return whether the elements are adjacent in memory, without gaps or overlaps, for any order of the axes.

    Example:
        >>> is_dense(torch.zeros(2, 3).t()), is_dense(torch.zeros(1, 3).expand(2, 3))
        (True, False)
    """
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(x.stride(), x.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    """Return the tensor itself if it is dense, otherwise a contiguous copy."""
    return x if is_dense(x) else x.contiguous()


def in_memory(x: Tensor) -> Tensor:
    """Return a one-dimensional view of a dense tensor in memory order."""
    return x.as_strided((x.numel(),), (1,))


def sampled(x: Tensor) -> Tensor:
    """Copy at most about a thousand values, evenly spaced in memory, as FP32.

    Example:
        >>> sampled(torch.arange(3)).tolist(), len(sampled(torch.zeros(100, 100)))
        ([0.0, 1.0, 2.0], 910)
    """
    # An odd stride does not sample along a single axis where the sizes are powers of two.
    stride = (-(-x.numel() // SAMPLE)) | 1
    return in_memory(dense(x))[::stride].to(torch.float32, copy=True)


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over aligned slices of dense tensors that have the same shape and strides.

    Example:
        >>> a, b = torch.arange(6.0).view(2, 3), torch.zeros(2, 3)
        >>> for x, y in blocks(a, b):
        ...     _ = y.copy_(x)
        >>> bool((a == b).all())
        True
    """
    flat = tuple(in_memory(t) for t in tensors)
    numel = tensors[0].numel()
    if numel <= BLOCK or tensors[0].device.type != "cpu":
        yield flat
        return
    for start in range(0, numel, BLOCK):
        yield tuple(t[start : start + BLOCK] for t in flat)


def like(x: Tensor, layout: Tensor) -> Tensor:
    """Return ``x`` with the strides of ``layout``, copied only if they differ."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout, dtype=x.dtype).copy_(x)
