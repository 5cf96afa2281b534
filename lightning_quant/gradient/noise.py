"""Reproducible rounding noise."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from torch import Tensor

from lightning_quant.functional.rounding import rounding_noise

# On a CPU a drawn number costs more than all the rest of rounding. There a pool of noise lasts for a few batches, and
# each tensor takes a slice as long as itself from an offset of its own: no two of its values share their noise, and
# neither the noise of different layers nor that of different batches is aligned.
POOL_BATCHES = 16
OFFSETS = 65_536


class NoiseSource:
    """Rounding noise from generators of its own, restarted at each batch from (seed, rank, batch).

    The seed and the number of the batch are all that is needed to continue. The global generators are left alone.

    Example:
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
        self._pool_age = -1
        self.restart(0)

    def restart(self, batch: int) -> None:
        """Start the noise of a batch."""
        self._key = self._hash(f"batch {batch}")
        self._offsets = random.Random(self._key)
        self._generators: dict[torch.device, torch.Generator] = {}
        if batch // POOL_BATCHES != self._pool_age:
            self._pool_age = batch // POOL_BATCHES
            self._pool_generator = torch.Generator().manual_seed(self._hash(f"pool {self._pool_age}"))
            self._pool = torch.empty(0)

    def _hash(self, what: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{self.rank}/{what}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")

    def draw(self, count: int, device: torch.device) -> Tensor:
        """Draw uniform noise in (-1/2, 1/2), FP32, shape (count,). It must not be written to."""
        if device.type == "cpu":
            offset = self._offsets.randrange(OFFSETS)
            return self._pooled(offset + count)[offset : offset + count]
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._key)
        return rounding_noise(count, self._generators[device])

    def _pooled(self, count: int) -> Tensor:
        """Return a pool of at least ``count`` values, which do not depend on how the pool has grown."""
        missing = count - self._pool.numel()
        if missing > 0:
            parts = [rounding_noise(OFFSETS, self._pool_generator) for _ in range(-(-missing // OFFSETS))]
            self._pool = torch.cat([self._pool, *parts])
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        # Generators can be neither pickled nor copied; restart makes them anew.
        return {"seed": self.seed, "rank": self.rank}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
