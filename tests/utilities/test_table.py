"""A plan as plain text, and as rich draws it."""

from __future__ import annotations

import io

from rich.console import Console
from torch import nn

from lightning_quant.nn import Bits, plan_layers
from lightning_quant.utilities.table import Tabled


class Brackets(Tabled):
    """Names that rich could take for markup."""

    heads = ("name", "note")

    def cells(self) -> list[tuple[str, ...]]:
        return [("[bold]layer[0]", "[/]")]

    def summary(self) -> str:
        return "one [/] " + "and another " * 30


def drawn(what: object, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width, force_jupyter=False, color_system=None).print(what)
    return text.getvalue()


def test_plain_text_and_rich_have_the_same_cells() -> None:
    plan = plan_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 2)), Bits(4, 4, 4))
    for text in (str(plan), drawn(plan, 100)):
        for row in plan.cells():
            assert all(cell in text for cell in row)
        assert plan.summary() in " ".join(text.split())
    assert "─" in drawn(plan, 100)
    assert "─" not in str(plan)


def test_names_are_not_markup_and_the_summary_is_one_line() -> None:
    for text in (str(Brackets()), drawn(Brackets(), 100)):
        assert "[bold]layer[0]" in text
        assert text.count("[/]") == 2
    assert str(Brackets()).splitlines()[-1] == Brackets().summary()


def test_lines_fit_a_narrow_terminal() -> None:
    plan = plan_layers(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), Bits(4, 4, 4))
    assert all(len(line) <= 60 for line in drawn(plan, 60).splitlines())
