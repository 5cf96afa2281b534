"""Rounding noise that a run can be repeated with."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from torch import Tensor

from lightning_quant.functional.rounding import rounding_noise

# The noise of a batch is a pool on CPUs, where a drawn number costs more than all the rest of rounding. Each tensor
# takes a slice as long as itself, from an offset of its own: no two of its values share their noise, and the noise of
# different layers is not aligned.
OFFSETS = 65_536


class NoiseSource:
    """Rounding noise from generators of its own, one a device, restarted at each batch from (seed, rank, batch).

    Nothing but the seed and the number of the batch is needed to continue, and no random number of the user's changes.

    >>> source = NoiseSource(seed=1)
    >>> source.restart(batch=5)
    >>> first = source.draw(3, torch.device("cpu"))
    >>> source.restart(batch=5)
    >>> bool((source.draw(3, torch.device("cpu")) == first).all())
    True
    """

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed = seed
        self.rank = rank
        self.restart(0)

    def restart(self, batch: int) -> None:
        """Begin the noise of a batch."""
        digest = hashlib.blake2b(f"{self.seed}/{self.rank}/{batch}".encode(), digest_size=7).digest()
        self._key = int.from_bytes(digest, "big")
        self._offsets = random.Random(self._key)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._pool = torch.empty(0)

    def draw(self, count: int, device: torch.device) -> Tensor:
        """Uniform noise in (-1/2, 1/2), FP32, shape (count,); not to be written to."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._key)
        if device.type != "cpu":
            return rounding_noise(count, self._generators[device])
        if count + OFFSETS > self._pool.numel():
            self._pool = rounding_noise(count + OFFSETS, self._generators[device])
        offset = self._offsets.randrange(OFFSETS)
        return self._pool[offset : offset + count]

    def __getstate__(self) -> dict[str, Any]:
        # Generators can be neither pickled nor copied; restart makes them anew.
        return {"seed": self.seed, "rank": self.rank}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
