"""Identity of a weight: detection of whether it changed since it was last seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Eight-byte words are summed in this many rows with different factors, so that swapped rows are detected.
_ROWS = 64

Mark = tuple[int, int, float]


def mark(weight: Tensor) -> Mark:
    """Return a value that changes when a weight is replaced or written to, cheap enough for every call.

    A write through ``weight.data`` does not change the version. On a CPU the sum of the weight reveals it; on an
    accelerator the sum is left out, since it would force a synchronization.

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
    """Compute a checksum of the bits of a weight, the same on every device.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> bool(fingerprint(weight) == fingerprint(weight.clone())), bool(fingerprint(weight) == fingerprint(-weight))
        (True, False)
    """
    octets = weight.detach().contiguous().view(-1).view(torch.uint8)
    words = F.pad(octets, (0, -len(octets) % (8 * _ROWS))).view(torch.int64).view(_ROWS, -1)
    # In a plain sum the highest bits, two sign bits, would cancel.
    mixed = words ^ (words >> 31)
    return (mixed.sum(1) * torch.arange(1, 2 * _ROWS, 2, device=words.device)).sum()
