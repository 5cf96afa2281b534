"""Memory and cosines over the window length: what is drawn is what was given."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.lines import Line2D

from benchmarks.adjoint_plots import draw_gradient_cosines, draw_memory
from lightning_quant.errors import ConfigurationError

WINDOWS = (1, 2, 5, 10, 20)
MEMORY = {"identity": dict.fromkeys(WINDOWS, 12e6), "bptt": {window: window * 12e6 for window in WINDOWS}}


def places(line: Line2D) -> list[tuple[float, float]]:
    """x and y of each point."""
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


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


def test_pictures_are_png_files_of_a_readable_size(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    draw_memory(MEMORY, path)
    assert imread(path).shape[:2] == (630, 1020)
    draw_gradient_cosines({"identity": {1: 1.0}}, path)
    assert imread(path).shape[:2] == (630, 1020)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No adjoint to draw"):
        draw_memory({}, tmp_path / "x.png")
    with pytest.raises(ConfigurationError, match="exact: no number at all"):
        draw_gradient_cosines({"exact": {}}, tmp_path / "x.png")
