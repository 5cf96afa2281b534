"""Lloyd's k-means on the ranges of channels and on the maxima of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError

MOST_ITERATIONS = 50
# Once the objective falls by less than this share per iteration, only single points still move.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Clustering:
    """Result of k-means.

    Attributes:
        centres: Centers (groups, dimensions), FP64, in ascending order of width.
        assignment: Index of the center of each point, (points,).
        objective: Sum of squared distances before each iteration and at the end; it never rises.
    """

    centres: Tensor
    assignment: Tensor
    objective: tuple[float, ...]


def kmeans(points: Tensor, groups: int) -> Clustering:
    """Cluster points with Lloyd's algorithm, which minimizes the sum of squared distances to the nearest center.

    The result is deterministic. The algorithm starts from buckets of equal count in the order of width (last minus
    first coordinate). A group that loses all its points is seeded again with the point farthest from its center.

    Args:
        points: Points (points, dimensions): (min, max) of channels, or (max,) of rows.
        groups: Number of groups, 1 to the number of points.

    Raises:
        ConfigurationError: More groups than points, or none.

    Example:
        >>> kmeans(torch.tensor([[0.0, 1.0], [0.0, 1.2], [-5.0, 5.0], [-5.2, 5.0]]), 2).centres
        tensor([[ 0.0000,  1.1000],
                [-5.1000,  5.0000]], dtype=torch.float64)
    """
    if not 1 <= groups <= len(points):
        raise ConfigurationError(f"groups={groups}: expected 1 to {len(points)}, the number of points to group.")
    points = points.double()
    permutation = _order(points)
    points = points[permutation]
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
    return Clustering(centres[order], order.argsort()[assignment[permutation.argsort()]], tuple(objective))


def width(points: Tensor) -> Tensor:
    """Return max minus min of points (min, max), or the maximum itself of points (max,)."""
    return points[:, -1] - points[:, 0] if points.shape[1] > 1 else points[:, 0]


def _order(points: Tensor) -> Tensor:
    """Sort points by width, and points of equal width by their coordinates.

    With inputs quantized upstream, many channels have the same width. Sorted by width alone, the centers would depend
    on the order in which ranks contribute their points.
    """
    order = torch.arange(len(points), device=points.device)
    for key in (*points.unbind(dim=1), width(points)):
        order = order[key[order].argsort(stable=True)]
    return order


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    # The squares of the points are the same for all centers. Without them it is one product, several times faster.
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
