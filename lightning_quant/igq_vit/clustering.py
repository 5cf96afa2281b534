"""Lloyd's k-means on the ranges of channels and on the maxima of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError

MOST_ITERATIONS = 50
# Where the objective falls by less than this share an iteration, further ones only move single points.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Clustering:
    """Centres, and how they were found.

    Attributes:
        centres: (groups, dimensions) FP64, in ascending order of their width.
        assignment: (points,) index of the centre of each point.
        objective: sum of squared distances before each iteration and at the end; never rises.
    """

    centres: Tensor
    assignment: Tensor
    objective: tuple[float, ...]


def kmeans(points: Tensor, groups: int) -> Clustering:
    """Centres that minimize the sum of squared distances to the nearest one, by Lloyd's algorithm; deterministic.

    Starts from buckets of equal count in the order of the width (last minus first coordinate); a group that has
    lost all its points is seeded anew with the point that is farthest from its centre.

    Args:
        points: (points, dimensions): (min, max) of channels, or (max,) of rows.
        groups: 1 .. points.

    Raises:
        ConfigurationError: more groups than points, or none.

    Example:
        >>> kmeans(torch.tensor([[0.0, 1.0], [0.0, 1.2], [-5.0, 5.0], [-5.2, 5.0]]), 2).centres
        tensor([[ 0.0000,  1.1000],
                [-5.1000,  5.0000]], dtype=torch.float64)
    """
    if not 1 <= groups <= len(points):
        raise ConfigurationError(f"groups={groups}: expected 1 .. {len(points)}, the number of points to group.")
    points = points.double()
    given = _order(points)
    points = points[given]
    centres = torch.stack([bucket.mean(dim=0) for bucket in points.tensor_split(groups)])
    assignment, distance = _nearest(points, centres)
    objective = [float(distance.sum())]
    for _ in range(MOST_ITERATIONS):
        centres = _means(points, assignment, distance, centres)
        assignment, distance = _nearest(points, centres)
        objective.append(float(distance.sum()))
        if objective[-2] - objective[-1] <= TOLERANCE * objective[-2]:
            break
    order = width(centres).argsort(stable=True)
    return Clustering(centres[order], order.argsort()[assignment[given.argsort()]], tuple(objective))


def width(points: Tensor) -> Tensor:
    """Max minus min of (min, max), or the maximum itself of (max,)."""
    return points[:, -1] - points[:, 0] if points.shape[1] > 1 else points[:, 0]


def _order(points: Tensor) -> Tensor:
    """Ascending by width, those of equal width by their coordinates.

    Quantized upstream, many channels have the same width: by width alone the centres would depend on the order in
    which ranks bring their points.
    """
    order = torch.arange(len(points), device=points.device)
    for key in (*points.unbind(dim=1), width(points)):
        order = order[key[order].argsort(stable=True)]
    return order


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    # Without the squares of the points, which are the same for all centres: one product, several times faster.
    assignment = torch.addmm(centres.square().sum(dim=1), points, centres.T, alpha=-2).argmin(dim=1)
    return assignment, (points - centres[assignment]).square().sum(dim=1)


def _means(points: Tensor, assignment: Tensor, distance: Tensor, centres: Tensor) -> Tensor:
    counts = torch.bincount(assignment, minlength=len(centres))
    sums = torch.zeros_like(centres).index_add_(0, assignment, points)
    means = sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        means[empty] = points[distance.topk(len(empty)).indices]
    return means
