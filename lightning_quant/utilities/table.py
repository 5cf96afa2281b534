"""Tables of plans, as plain text and for rich."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Group
    from rich.table import Table

# Width of plain text, which has no terminal. The names and notes of most networks fit.
_WIDTH = 180


class Tabled:
    """Base class of objects with rows and a summary, which ``print``, ``rich.print`` and notebooks show as a table.

    Example:
        >>> class Pairs(Tabled):
        ...     heads = ("number", "square")
        ...     def cells(self):
        ...         return ((str(number), str(number**2)) for number in (1, 2))
        ...     def summary(self):
        ...         return "2 numbers."
        >>> print(Pairs())
         number  square
         1       1
         2       4
        2 numbers.
    """

    heads: ClassVar[tuple[str, ...]]

    def cells(self) -> Iterable[tuple[str, ...]]:
        """Return the rows, each with one string per head."""
        raise NotImplementedError

    def summary(self) -> str:
        """Summarize the rows in one sentence."""
        raise NotImplementedError

    def _table(self, lines: Box | None) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(*self.heads, box=lines)
        for row in self.cells():
            # As Text rather than markup, since names may contain brackets.
            table.add_row(*map(Text, row))
        return table

    def __rich__(self) -> Group:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.text import Text

        return Group(self._table(SIMPLE_HEAD), Text(self.summary()))

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, force_jupyter=False, color_system=None, width=_WIDTH).print(self._table(None))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n" + self.summary()
