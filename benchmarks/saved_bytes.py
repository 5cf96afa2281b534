"""How much memory the graphs of a computation hold, counted and not measured: the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import finalize

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def peak_saved_bytes(call: Callable[[], object], without: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd holds for backward passes at the most, at any one time while a function runs.

    Memory that several nodes of the graph hold is counted once, with all of its bytes where they hold a view of it.
    What forward passes need and let go of, gradients and optimizers are not counted. A graph that is there when
    the call returns was held to the end.

    Args:
        call: does forward and backward passes.
        without: tensors whose memory is there anyway, for example the parameters.

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
    """In the graph in place of a tensor; gone when the graph lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        # Without its graph, which would hold itself where the tensor is the result of its node.
        self.tensor = tensor.detach()

    def unpack(self) -> Tensor:
        return self.tensor


class _Held:
    """The memory that is held, by its address, and by how many."""

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
