"""Plans print as tables: in plain text, and by rich itself where it prints them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Group
    from rich.table import Table

# Of plain text, which has no terminal; names and notes of most networks fit.
_WIDTH = 180


class Tabled:
    """What has rows and a summary; ``print`` writes both, ``rich.print`` and notebooks draw them.

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
        """A text for each of the heads, for each row."""
        raise NotImplementedError

    def summary(self) -> str:
        """In a sentence."""
        raise NotImplementedError

    def _table(self, lines: Box | None) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(*self.heads, box=lines)
        for row in self.cells():
            # Not markup: names may hold brackets.
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
