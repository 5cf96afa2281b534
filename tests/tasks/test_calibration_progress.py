"""The bar of a calibration counts where the Trainer shows bars, and is silent where not."""

from __future__ import annotations

import pytest

from lightning_quant.tasks.calibration_progress import ProgressBar, duration
from networks import trainer as quiet


def test_it_counts_and_closes() -> None:
    with ProgressBar(quiet(enable_progress_bar=True), 5, "Calibrating") as bar:
        bar.update(2, "ranges")
        bar.update()
        assert (bar.bar.n, bar.bar.total, bar.bar.postfix) == (3, 5, "ranges")
    assert bar.bar.disable


def test_without_bars_of_the_trainer_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(quiet(), 5, "Calibrating") as bar:
        bar.update(5, "ranges")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h")]
)
def test_durations_are_said_in_the_unit_that_fits(seconds: float, said: str) -> None:
    assert duration(seconds) == said
