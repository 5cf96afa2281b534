"""Rounding noise that a run can be repeated with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from lightning_quant.functional.rounding import rounding_noise


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
        self._key = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def restart(self, batch: int) -> None:
        """Begin the noise of a batch."""
        digest = hashlib.blake2b(f"{self.seed}/{self.rank}/{batch}".encode(), digest_size=7).digest()
        self._key = int.from_bytes(digest, "big")
        for generator in self._generators.values():
            generator.manual_seed(self._key)

    def draw(self, count: int, device: torch.device) -> Tensor:
        """Uniform noise in (-1/2, 1/2), FP32, shape (count,)."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._key)
        return rounding_noise(count, self._generators[device])

    def __getstate__(self) -> dict[str, Any]:
        # Generators can be neither pickled nor copied, and restart makes them anew.
        return self.__dict__ | {"_generators": {}}
