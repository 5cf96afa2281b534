"""Table with a row of numbers per image, merged over ranks in an order that is independent of batches and ranks."""

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
    """Table with one row per image.

    With ids, an image counts once even if it was added several times: samplers repeat images so that all ranks get the
    same number.

    Attributes:
        columns: Batches of each column on the CPU, including ``ids`` if given.

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
        """Add the rows of a batch.

        Args:
            columns: Name and values (n, ...) of each column.
            ids: Integers (n,) that identify an image across all ranks.

        Raises:
            ConfigurationError: The columns differ from those of earlier batches, or the number of ids differs.
        """
        rows = {name: column.cpu() for name, column in columns.items()}
        if ids is not None:
            rows[IDS] = ids.cpu()
        count = {len(column) for column in rows.values()}
        if len(count) > 1:
            raise ConfigurationError(f"Rows for {sorted(count)} images in one batch: pass one id per image.")
        if self.columns and (differing := sorted(self.columns.keys() ^ rows.keys())):
            raise ConfigurationError(
                f"Only some batches have {', '.join(differing)}: pass the same arguments for every batch."
            )
        for name, column in rows.items():
            self.columns.setdefault(name, []).append(column)

    def joined(self) -> ImageTable:
        """Return the same table with a single batch."""
        return ImageTable({name: [torch.cat(batches)] for name, batches in self.columns.items()})


def merge(tables: Sequence[ImageTable]) -> dict[str, Tensor]:
    """Merge tables: the columns that all non-empty tables have, each image once, sorted by ids or by the rows.

    Args:
        tables: Tables of all ranks, some of which may be empty.

    Returns:
        Values (n, ...) of each column by its name. Empty if there are no rows.
    """
    filled = [table for table in tables if table]
    if not filled:
        return {}
    names = set.intersection(*(set(table.columns) for table in filled))
    columns = {name: torch.cat([batch for table in filled for batch in table.columns[name]]) for name in sorted(names)}
    order = _first_of_each(columns.pop(IDS)) if IDS in columns else _by_value(columns)
    return {name: column[order] for name, column in columns.items()}


def _first_of_each(ids: Tensor) -> Tensor:
    return torch.from_numpy(np.unique(ids.numpy(), return_index=True)[1])


def _by_value(columns: Mapping[str, Tensor]) -> Tensor:
    """Return the order of the rows by their sums, which are equal only for equal images."""
    sums = [column.double().reshape(len(column), -1).sum(1).numpy() for column in columns.values()]
    return torch.from_numpy(np.lexsort(sums))
