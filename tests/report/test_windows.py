"""End error over the window length: what is drawn is what was given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.lines import Line2D

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.windows import draw_window_sweep

SWEEP = {10: [0.14, 0.16], 1: [0.17, 0.19], 4: [0.10, 0.12]}


def places(line: Line2D) -> list[tuple[float, float]]:
    """x and y of each point."""
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_sweep_has_every_seed_their_mean_and_a_ring_at_the_chosen_window() -> None:
    (axes,) = draw_window_sweep(SWEEP, chosen=10, calls=960).axes
    *seeds, mean, ring = axes.lines
    assert [places(line) for line in seeds] == [[(window, error) for error in SWEEP[window]] for window in (1, 4, 10)]
    np.testing.assert_allclose(places(mean), [(1, 0.18), (4, 0.11), (10, 0.15)])
    np.testing.assert_allclose(places(ring), [(10, 0.15)])
    assert axes.get_title(loc="left") == "chosen: M = 10: 0.150, each with 960 network calls"
    assert "2 seeds" in axes.get_ylabel()
    assert list(axes.get_xticks()) == [1, 4, 10]


def test_without_a_choice_the_lowest_mean_is_marked() -> None:
    (axes,) = draw_window_sweep({1: 0.2, 4: torch.tensor(0.1), 10: torch.tensor([0.05, 0.25])}).axes
    assert axes.get_title(loc="left") == "lowest at M = 4: 0.100, with equal network calls"


def test_the_level_before_is_written_beside_its_line() -> None:
    (axes,) = draw_window_sweep(SWEEP, before=0.45).axes
    assert labels(axes) == ["before\n0.450"]
    assert set(np.asarray(axes.lines[-1].get_ydata())) == {0.45}


@pytest.mark.parametrize(("ratio", "scale"), [(9.9, "linear"), (10.1, "log")])
def test_more_than_a_decade_is_logarithmic_and_less_starts_at_zero(ratio: float, scale: str) -> None:
    (axes,) = draw_window_sweep({1: 1.0, 2: ratio}).axes
    assert axes.get_yscale() == scale
    assert (axes.get_ylim()[0] == 0) == (scale == "linear")


def test_many_windows_have_ticks_that_do_not_touch() -> None:
    (axes,) = draw_window_sweep(dict.fromkeys(range(1, 65), 1.0)).axes
    ticks = np.log(axes.get_xticks())
    assert {ticks[0], ticks[-1]} == {0.0, np.log(64)}
    assert np.diff(ticks).min() >= 0.05 * np.log(64)


def test_pictures_are_png_files_of_a_readable_size(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    draw_window_sweep(SWEEP, path)
    assert imread(path).shape[:2] == (630, 1020)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ConfigurationError, match="window sweep: no number at all: expected one or several numbers"):
        draw_window_sweep({}, path)
    with pytest.raises(ConfigurationError, match="window sweep: no number for the window 4"):
        draw_window_sweep({1: 0.1, 4: []}, path)
    with pytest.raises(ConfigurationError, match="chosen=3 is not in the sweep: expected one of 1, 4, 10"):
        draw_window_sweep(SWEEP, path, chosen=3)
    assert not path.exists()
