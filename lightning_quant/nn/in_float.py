"""A quantized network as it was in float, for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_quant.nn.structure import quantizers_of


@contextmanager
def in_float(module: nn.Module, owners: Collection[str] | None = None) -> Iterator[None]:
    """Take the quantizers of a module out of their slots; afterwards each is back in its own.

    Args:
        module: quantized.
        owners: names of the layers and attentions whose quantizers are taken; None takes all.

    >>> import torch
    >>> from lightning_quant.nn import swap
    >>> from lightning_quant.quantizers import FixedQuantizer
    >>> network = nn.Sequential(nn.Linear(4, 4)).eval()
    >>> x = torch.randn(2, 4)
    >>> expected = network(x)
    >>> _ = swap(network[0], FixedQuantizer(4), FixedQuantizer(4))
    >>> with in_float(network):
    ...     torch.equal(network(x), expected)
    True
    """
    taken = []
    for name, quantizer in list(quantizers_of(module)):
        owner, _, slot = name.rpartition(".")
        if owners is not None and owner not in owners:
            continue
        taken.append((module.get_submodule(owner), slot, quantizer))
    for parent, slot, _ in taken:
        parent._modules[slot] = None
    try:
        yield
    finally:
        for parent, slot, quantizer in taken:
            parent._modules[slot] = quantizer
