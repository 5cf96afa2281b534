"""Loader with which a Trainer iterates over the steps of a calibration instead of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class _Steps(IterableDataset[int]):
    """Step numbers. As an iterable they are not split among ranks: each runs every step, on its share of the data."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


class _Loader(DataLoader[Any]):
    """DataLoader that Lightning can resume mid-epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state, since the calibration knows its next step."""


def step_loader(count: int) -> DataLoader[Any]:
    """Create a loader of step numbers, all of them on every rank.

    Example:
        >>> list(step_loader(3))
        [0, 1, 2]
    """
    return _Loader(_Steps(count), batch_size=None)


class Anchor(nn.Module):
    """Module with one parameter that requires a gradient, which DDP needs. It is not saved in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def _save_to_state_dict(self, *args: Any) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load nothing."""
