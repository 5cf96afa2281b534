"""Rows of numbers of images, gathered from all ranks in an order that depends on neither batches nor ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError

IDS = "ids"
_T = TypeVar("_T")


@dataclass
class ImageTable:
    """Columns of float rows, one row for each image.

    With ids an image counts once, however often it was added: samplers repeat images so that ranks get equally many.

    Attributes:
        columns: batches of each column, on the CPU; ``ids`` among them where they were given.

    Example:
        >>> table = ImageTable()
        >>> table.add({"error": torch.tensor([3.0, 1.0, 1.0])}, ids=torch.tensor([7, 2, 2]))
        >>> merge([table])["error"].tolist()
        [1.0, 3.0]
    """

    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.columns)

    def add(self, columns: Mapping[str, Tensor], ids: Tensor | None = None) -> None:
        """Rows of a batch.

        Args:
            columns: name to (n, ...) of each.
            ids: (n,) integers, one for each image over all ranks.

        Raises:
            ConfigurationError: other columns than before, ids of another number.
        """
        rows = {name: column.cpu() for name, column in columns.items()}
        if ids is not None:
            rows[IDS] = ids.cpu()
        count = {len(column) for column in rows.values()}
        if len(count) > 1:
            raise ConfigurationError(f"Rows for {sorted(count)} images in one batch: give one id for each image.")
        if self.columns and (unlike := sorted(self.columns.keys() ^ rows.keys())):
            raise ConfigurationError(
                f"Some batches have {', '.join(unlike)} and others do not: give the same kinds of arguments in each."
            )
        for name, column in rows.items():
            self.columns.setdefault(name, []).append(column)

    def joined(self) -> ImageTable:
        """The same with one batch."""
        return ImageTable({name: [torch.cat(batches)] for name, batches in self.columns.items()})


def merge(tables: Sequence[ImageTable]) -> dict[str, Tensor]:
    """Columns that all tables with rows have, each image once, sorted by ids or else by the rows themselves.

    Args:
        tables: one for each rank, some maybe empty.

    Returns:
        Name to (n, ...); empty without any rows.
    """
    filled = [table for table in tables if table]
    if not filled:
        return {}
    names = set.intersection(*(set(table.columns) for table in filled))
    found = {name: torch.cat([batch for table in filled for batch in table.columns[name]]) for name in sorted(names)}
    order = _first_of_each(found.pop(IDS)) if IDS in found else _by_value(found)
    return {name: column[order] for name, column in found.items()}


def _first_of_each(ids: Tensor) -> Tensor:
    return torch.from_numpy(np.unique(ids.numpy(), return_index=True)[1])


def _by_value(columns: Mapping[str, Tensor]) -> Tensor:
    """By the sum of each row: equal only for equal images."""
    sums = [column.double().reshape(len(column), -1).sum(1).numpy() for column in columns.values()]
    return torch.from_numpy(np.lexsort(sums))
