"""What lets a Trainer's loop over batches be one over the steps of a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class _Steps(IterableDataset[int]):
    """As an iterable it is not divided among ranks: each does every step, on its share of the data."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


class _Loader(DataLoader[Any]):
    """Says to Lightning that it can go on in the middle."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Which step comes next is known to the calibration."""


def step_loader(count: int) -> DataLoader[Any]:
    """Numbers of steps, all of them for every rank.

    Example:
        >>> list(step_loader(3))
        [0, 1, 2]
    """
    return _Loader(_Steps(count), batch_size=None)


class Anchor(nn.Module):
    """A parameter that requires a gradient, without which DDP takes no module; in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def _save_to_state_dict(self, *args: Any) -> None:
        """Nothing."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing."""
