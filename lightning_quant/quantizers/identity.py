"""Tells whether a weight is still the one that was seen before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Words of eight bytes are summed in this many rows, so that rows that change places are noticed.
_ROWS = 64

Mark = tuple[int, int, float]


def mark(weight: Tensor) -> Mark:
    """Return what changes when a weight is exchanged or written to, cheap enough for each call.

    A write through ``weight.data`` has no version. On a CPU the sum of the weight shows it; on an accelerator that
    would have to be waited for.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> before = mark(weight)
        >>> _ = weight.data.mul_(2)
        >>> mark(weight) == before
        False
    """
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, float(weight.detach().sum()) if weight.device.type == "cpu" else 0.0


def fingerprint(weight: Tensor) -> Tensor:
    """Return a number of the bits of a weight, the same on every device.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> bool(fingerprint(weight) == fingerprint(weight.clone())), bool(fingerprint(weight) == fingerprint(-weight))
        (True, False)
    """
    octets = weight.detach().contiguous().view(-1).view(torch.uint8)
    words = F.pad(octets, (0, -len(octets) % (8 * _ROWS))).view(torch.int64).view(_ROWS, -1)
    # Of a sum two signs of numbers, the highest bits, would cancel.
    mixed = words ^ (words >> 31)
    return (mixed.sum(1) * torch.arange(1, 2 * _ROWS, 2, device=words.device)).sum()
