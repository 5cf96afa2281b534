"""The bar of a calibration counts where the Trainer shows bars, and is silent where not."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from helpers.networks import SmallNet
from helpers.networks import trainer as quiet
from lightning_quant.utilities.progress import ProgressBar
from lightning_quant.utilities.text import duration


@pytest.fixture
def terminal() -> Iterator[io.StringIO]:
    """What rich writes to the console that all share, as if it was a terminal."""
    text = io.StringIO()
    rich.reconfigure(file=text, force_terminal=True, width=120, color_system=None)
    yield text
    rich.reconfigure()


def test_it_counts_and_closes() -> None:
    with ProgressBar(quiet(TQDMProgressBar(), enable_progress_bar=True), 5, "Calibrating") as bar:
        bar.update(2, "ranges")
        bar.update()
        assert (bar.bar.n, bar.bar.total, bar.bar.postfix) == (3, 5, "ranges")
    assert bar.bar.disable


def test_where_the_trainer_draws_by_rich_it_does_too(terminal: io.StringIO) -> None:
    theirs = RichProgressBar()
    with ProgressBar(quiet(theirs, enable_progress_bar=True), 5, "Calibrating") as bar:
        bar.update(2, "ranges")
        bar.update()
    assert theirs.progress is None
    assert re.search(r"Calibrating ranges .*3/5 .*0:00:0", terminal.getvalue())


class Between(pl.Callback):
    """Has something of its own to count before the first batch and after the last."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count(trainer, "Before")

    def on_test_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.count(trainer, "Meanwhile")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count(trainer, "After")

    def count(self, trainer: pl.Trainer, what: str) -> None:
        with ProgressBar(trainer, 3, what) as bar:
            for _ in range(3):
                bar.update()
        drawn = getattr(trainer.progress_bar_callback, "progress", None)
        # Not left behind in Lightning's display.
        assert drawn is None or not any(task.visible for task in drawn.tasks if what in task.description)


def test_it_is_a_line_of_their_display_while_that_is_drawn(terminal: io.StringIO) -> None:
    theirs = RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True, "width": 120})
    run = quiet(Between(), theirs, enable_progress_bar=True)
    run.test(SmallNet(), verbose=False)
    shown = terminal.getvalue()
    for what in ("Before", "Meanwhile", "After", "Testing"):
        assert re.search(rf"{what} .*\d/\d .*0:00:0", shown), what


def test_without_bars_of_the_trainer_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(quiet(), 5, "Calibrating") as bar:
        bar.update(5, "ranges")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")]
)
def test_durations_are_said_in_the_unit_that_fits(seconds: float, said: str) -> None:
    assert duration(seconds) == said
