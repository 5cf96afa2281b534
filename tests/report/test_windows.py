"""End error, memory and cosines over the window length: what is drawn is what was given, and labels stay apart."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.text import Text

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.windows import (
    draw_gradient_cosines,
    draw_memory,
    draw_window_sweep,
    label_ends,
    panels,
    scale_values,
)

SWEEP = {10: [0.14, 0.16], 1: [0.17, 0.19], 4: [0.10, 0.12]}
WINDOWS = (1, 2, 5, 10, 20)
MEMORY = {"identity": dict.fromkeys(WINDOWS, 12e6), "bptt": {window: window * 12e6 for window in WINDOWS}}


def places(line: Line2D) -> list[tuple[float, float]]:
    """x and y of each point."""
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def boxes(figure: Figure, axes: Axes) -> list[tuple[float, float]]:
    """Lower and upper end of each label in pixels, from the lowest."""
    figure.draw_without_rendering()
    # Of the text alone: the extent of an annotation has its line too.
    extents = [Text.get_window_extent(text) for text in axes.texts]
    return sorted((float(box.y0), float(box.y1)) for box in extents)


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


def test_memory_is_in_megabytes_with_its_growth() -> None:
    (axes,) = draw_memory(MEMORY).axes
    assert labels(axes) == ["identity\n12.0 MB (x1.00)", "bptt\n240 MB (x20.0)"]
    assert places(axes.lines[1]) == [(window, 12.0 * window) for window in WINDOWS]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "MB" in axes.get_ylabel()


def test_cosines_stand_in_the_slot_of_their_window_from_noise_to_image() -> None:
    (axes,) = draw_gradient_cosines(
        {"identity": {20: [0.9, 0.95, 1.0], 2: 1.0}, "per_step": {20: [-0.2, 0.0, 0.4]}}
    ).axes
    one, many, other = (places(line) for line in axes.lines if line.get_marker() != "None")
    assert one == [(0, 1.0)]
    assert [y for _, y in many] == [0.9, 0.95, 1.0]
    assert [x for x, _ in many] == sorted(x for x, _ in many)
    assert all(0.5 < x < 1.5 for x, _ in many + other)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "20"]
    assert labels(axes) == ["identity\nmean 0.95", "per_step\nmean 0.07"]
    assert axes.get_ylim()[0] < -0.2


def test_single_cosines_are_joined_over_the_windows() -> None:
    (axes,) = draw_gradient_cosines({"exact": {1: 1.0, 4: 0.99}}).axes
    assert places(axes.lines[0]) == [(0, 1.0), (1, 0.99)]
    assert labels(axes) == ["exact\n0.99"]
    assert "positions" not in axes.get_xlabel()


@pytest.mark.parametrize("ends", [[0.1] * 6, [0.1, 0.101, 0.5, 0.9, 0.901, 1.0], [0.0, float("nan"), float("inf")]])
def test_labels_stand_apart_and_in_the_order_of_the_lines(ends: list[float]) -> None:
    figure, (axes,) = panels(1)
    scale_values(axes, np.array(ends))
    axes.plot([0, 1], [ends, ends])
    label_ends(axes, [(1, y, f"line {i}\n{y}", "k") for i, y in enumerate(ends)])
    found = boxes(figure, axes)
    assert all(below[1] <= above[0] for below, above in pairwise(found))
    heights = [text.get_position()[1] for text in axes.texts]
    finite = [i for i, y in enumerate(ends) if np.isfinite(y)]
    assert all(ends[i] <= ends[j] for i in finite for j in finite if heights[i] < heights[j])


def test_pictures_are_png_files_of_a_readable_size(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    for draw in (
        lambda: draw_window_sweep(SWEEP, path),
        lambda: draw_memory(MEMORY, path),
        lambda: draw_gradient_cosines({"identity": {1: 1.0}}, path),
    ):
        draw()
        height, width = imread(path).shape[:2]
        assert (height, width) == (630, 1020)
        path.unlink()


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ConfigurationError, match="window sweep: no number at all: expected a number, or several"):
        draw_window_sweep({}, path)
    with pytest.raises(ConfigurationError, match="window sweep: no number for the window 4"):
        draw_window_sweep({1: 0.1, 4: []}, path)
    with pytest.raises(ConfigurationError, match="chosen=3 is not in the sweep: it has the windows 1, 4, 10"):
        draw_window_sweep(SWEEP, path, chosen=3)
    with pytest.raises(ConfigurationError, match="No adjoint to draw"):
        draw_memory({}, path)
    with pytest.raises(ConfigurationError, match="exact: no number at all"):
        draw_gradient_cosines({"exact": {}}, path)
    assert not path.exists()
