"""Memory that autograd graphs hold, counted rather than measured, so that it is the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import finalize

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def peak_saved_bytes(call: Callable[[], object], without: Iterable[Tensor] = ()) -> int:
    """Count the peak number of bytes that autograd saves for backward passes while a function runs.

    Memory that several nodes of the graph share is counted once, and in full if they hold only a view of it. Temporary
    memory of forward passes, gradients and optimizers are not counted. A graph that still exists when the call returns
    is counted to the end.

    Args:
        call: Function that runs forward and backward passes.
        without: Tensors whose memory exists anyway, for example the parameters.

    Example:
        >>> import torch
        >>> x = torch.ones(1000, requires_grad=True)
        >>> peak_saved_bytes(lambda: x.exp().sum().backward())
        4000
        >>> peak_saved_bytes(lambda: [x.exp().sum().backward() for _ in range(5)])
        4000
        >>> peak_saved_bytes(lambda: x.exp().exp().sum().backward(), without=[x])
        8000
    """
    held = _Held({_place(tensor) for tensor in without})
    with saved_tensors_hooks(held.pack, _Saved.unpack):
        call()
    return held.peak


class _Saved:
    """Replacement of a tensor in the graph, which is destroyed when the graph releases it."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached, since the graph would hold itself if the tensor is the output of its node.
        self.tensor = tensor.detach()

    def unpack(self) -> Tensor:
        return self.tensor


class _Held:
    """Saved memory by its address, with the number of its holders."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> _Saved:
        saved, place = _Saved(tensor), _place(tensor)
        if place not in self.ignored:
            size = tensor.untyped_storage().nbytes()
            self._count(place, 1, size)
            finalize(saved, self._count, place, -1, size)
        return saved

    def _count(self, place: int, holders: int, size: int) -> None:
        before = self.holders.pop(place, 0)
        after = before + holders
        if after:
            self.holders[place] = after
        self.now += size * (bool(after) - bool(before))
        self.peak = max(self.peak, self.now)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
