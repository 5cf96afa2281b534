"""The budget curve and the ranges of channels: what is drawn is what was given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from lightning_quant.errors import ConfigurationError
from lightning_quant.igq_vit.allocation import BudgetPoint, budget_curve
from lightning_quant.report import draw_budget_curve, draw_channel_ranges

GROUPS = (1, 2, 4, 8)
Drawing = Callable[[], Figure]


def points(omega: float = 1.0) -> list[BudgetPoint]:
    strengths = (omega, 2 * omega, 5 * omega)
    return budget_curve(
        [{g: strength / g for g in GROUPS} for strength in strengths],
        [{g: (100 + g) * 10**9 for g in GROUPS}] * 3,
    )


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Drawing:
    """The figure that was saved last."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", keep)
    return lambda: figures[-1]


def places(line: Line2D) -> list[list[float]]:
    """x and y of each point."""
    return [[float(x), float(y)] for x, y in np.asarray(line.get_xydata())]


def test_the_curve_carries_the_points(tmp_path: Path, saved: Drawing) -> None:
    curve = points()
    draw_budget_curve(curve, tmp_path / "curve.png", title="a network", chosen=4)
    (axes,) = saved().axes
    uniform, allocated, marked = axes.lines
    assert places(uniform) == [[p.budget / 1e9, p.uniform_omega] for p in curve]
    assert places(allocated) == [[p.used / 1e9, p.omega] for p in curve]
    assert places(marked) == [[curve[2].used / 1e9, curve[2].omega]]
    assert {text.get_text() for text in axes.texts} >= {"1", "2", "4", "8"}
    assert "GBOPs" in axes.get_xlabel()
    assert "KL divergence" in axes.get_ylabel()
    assert axes.get_yscale() == "log"


def test_the_chosen_point_is_where_its_allocation_is(tmp_path: Path, saved: Drawing) -> None:
    point = BudgetPoint(groups=4, budget=8 * 10**9, used=6 * 10**9, omega=0.5, uniform_omega=0.7, choice=(4, 2))
    draw_budget_curve([point], tmp_path / "curve.png", chosen=4)
    *_, marked = saved().axes[0].lines
    assert places(marked) == [[6.0, 0.5]]


def test_the_cost_of_softmax_is_in_groups(tmp_path: Path, saved: Drawing) -> None:
    curve = points()
    draw_budget_curve(curve, tmp_path / "curve.png", unit="groups in all layers")
    (axes,) = saved().axes
    assert axes.get_xlabel() == "groups in all layers"
    assert places(axes.lines[0]) == [[p.budget, p.uniform_omega] for p in curve]
    assert len(axes.lines) == 2


def test_a_perturbation_of_zero_is_drawn(tmp_path: Path, saved: Drawing) -> None:
    draw_budget_curve(points(omega=0.0), tmp_path / "curve.png")
    assert saved().axes[0].get_yscale() == "linear"


CHANNELS = dict(enumerate([(-1.0, 1.0), (-9.0, 9.0), (-1.0, 1.5), (-8.0, 9.0), (0.0, 3.0)]))
LOW, HIGH = (np.array([ends[side] for ends in CHANNELS.values()]) for side in (0, 1))
GROUP = np.array([2, 0, 2, 0, 1])


def bars(figure: Figure, panel: int) -> list[tuple[float, float]]:
    """Ends of the bars from left to right, and that each is upright in its own place."""
    collection = next(c for c in figure.axes[panel].collections if isinstance(c, LineCollection) and _upright(c))
    segments = [np.asarray(segment) for segment in collection.get_segments()]
    assert [segment[0, 0] for segment in segments] == [i + 0.5 for i in range(len(segments))]
    return [(float(segment[0, 1]), float(segment[1, 1])) for segment in segments]


def _upright(collection: LineCollection) -> bool:
    return all(segment[0][0] == segment[1][0] for segment in collection.get_segments())


def shades(figure: Figure, panel: int) -> list[tuple[float, float, float, float]]:
    """Start, end, low and high of the shaded ranges from left to right."""
    found = [patch for patch in figure.axes[panel].patches if isinstance(patch, Rectangle)]
    return [(p.get_x(), p.get_x() + p.get_width(), p.get_y(), p.get_y() + p.get_height()) for p in found]


def test_channels_before_are_in_order_over_one_range(tmp_path: Path, saved: Drawing) -> None:
    draw_channel_ranges(LOW, HIGH, GROUP, tmp_path / "ranges.png", title="a layer")
    assert bars(saved(), 0) == list(CHANNELS.values())
    assert shades(saved(), 0) == [(0, 5, -9.0, 9.0)]


def test_channels_after_are_sorted_by_group_over_the_range_of_each(tmp_path: Path, saved: Drawing) -> None:
    draw_channel_ranges(LOW, HIGH, GROUP, tmp_path / "ranges.png")
    assert bars(saved(), 1) == [CHANNELS[i] for i in (0, 2, 4, 3, 1)]
    assert shades(saved(), 1) == [(0, 2, -1.0, 1.5), (2, 3, 0.0, 3.0), (3, 5, -9.0, 9.0)]
    before, after = saved().axes
    assert (before.get_xlabel(), after.get_xlabel()) == ("channel", "channel, sorted by group")
    assert "min to max" in before.get_ylabel()
    assert after.get_title(loc="left") == "3 groups, each with its own range"
    assert before.get_ylim() == after.get_ylim()


def test_bounds_of_the_quantizers_take_the_place_of_what_channels_span(tmp_path: Path, saved: Drawing) -> None:
    draw_channel_ranges(LOW, HIGH, GROUP, tmp_path / "x.png", bounds=[(-8.5, 9.0), (0.0, 3.0), (-1.0, 1.25)])
    assert shades(saved(), 1) == [(0, 2, -1.0, 1.25), (2, 3, 0.0, 3.0), (3, 5, -8.5, 9.0)]


@pytest.mark.parametrize("channels", [1, 24, 3072])
def test_pictures_are_png_files_of_a_readable_size(tmp_path: Path, channels: int) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "new" / "ranges.png"
    high = random.random(channels)
    draw_channel_ranges(-high, high, random.integers(0, 3, channels), path, title="t")
    draw_budget_curve(points(), tmp_path / "curve.png", chosen=8)
    for picture in (path, tmp_path / "curve.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        height, width = imread(picture).shape[:2]
        assert 900 <= width <= 2000
        assert 500 <= height <= 1000


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ConfigurationError, match="No point to draw"):
        draw_budget_curve([], path)
    with pytest.raises(ConfigurationError, match=r"shapes \(0,\), \(0,\) and \(0,\)"):
        draw_channel_ranges([], [], [], path)
    assert not path.exists()


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ConfigurationError, match="No point for chosen=3 groups: expected 1, 2, 4, 8"):
        draw_budget_curve(points(), path, chosen=3)
    with pytest.raises(ConfigurationError, match=r"shapes \(2,\), \(3,\) and \(2,\)"):
        draw_channel_ranges([0, 0], [1, 1, 1], [0, 0], path)
    with pytest.raises(ConfigurationError, match=r"shapes \(1, 2\)"):
        draw_channel_ranges([[0, 0]], [[1, 1]], [[0, 0]], path)
    with pytest.raises(ConfigurationError, match="in group 2, but there are bounds for 2 groups"):
        draw_channel_ranges(LOW, HIGH, GROUP, path, bounds=[(0, 1), (0, 2)])
