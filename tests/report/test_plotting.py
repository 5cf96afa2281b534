"""The common style of pictures: labels stay apart."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_quant.report.plotting import label_ends, panels, scale_values


def boxes(figure: Figure, axes: Axes) -> list[tuple[float, float]]:
    """Lower and upper end of each label in pixels, from the lowest."""
    figure.draw_without_rendering()
    # Of the text alone: the extent of an annotation has its line too.
    extents = [Text.get_window_extent(text) for text in axes.texts]
    return sorted((float(box.y0), float(box.y1)) for box in extents)


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
