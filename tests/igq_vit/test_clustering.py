"""k-means: monotone, quick, deterministic, and no group empty."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.igq_vit.clustering import kmeans


def channels(count: int, seed: int) -> Tensor:
    """(min, max) of channels as transformers have them: many narrow ones, a few wide, some of one sign."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, generator=generator)
    half = torch.randn(count, generator=generator).exp()
    return torch.stack([centre - half, centre + half], dim=1)


def slow_lloyd(points: Tensor, centres: Tensor) -> Tensor:
    """To the fixed point, point by point."""
    rows = points.double().tolist()
    centre = centres.double().tolist()
    while True:
        groups: list[list[list[float]]] = [[] for _ in centre]
        for row in rows:
            distance = [sum((a - b) ** 2 for a, b in zip(row, c, strict=True)) for c in centre]
            groups[distance.index(min(distance))].append(row)
        moved = [[sum(column) / len(g) for column in zip(*g, strict=True)] for g in groups]
        if moved == centre:
            return torch.tensor(centre)
        centre = moved


@given(st.integers(1, 16), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_the_objective_never_rises(groups: int, seed: int) -> None:
    objective = kmeans(channels(120, seed), groups).objective
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(objective))


@pytest.mark.parametrize(("groups", "iterations"), [(4, 20), (8, 40), (24, 51)])
def test_few_iterations_end_it(groups: int, iterations: int) -> None:
    points = channels(32 * 384, 0)
    found = kmeans(points, groups)
    assert len(found.objective) <= iterations
    further = found.centres
    for _ in range(200):
        nearest = (points.double()[:, None] - further).square().sum(-1).argmin(1)
        further = torch.stack([points[nearest == group].double().mean(0) for group in range(groups)])
    distance = (points.double()[:, None] - further).square().sum(-1).min(1).values.sum()
    assert found.objective[-1] <= 1.1 * float(distance)


@pytest.mark.parametrize("seed", range(4))
def test_ends_near_a_fixed_point_of_the_slow_loop(seed: int) -> None:
    points = channels(60, seed)
    found = kmeans(points, 5)
    fixed = slow_lloyd(points, found.centres)
    distance = (points.double()[:, None] - fixed).square().sum(-1).min(1).values.sum()
    assert found.objective[-1] == pytest.approx(float(distance), rel=0.05)


def test_one_group_is_the_mean_and_as_many_as_points_are_the_points() -> None:
    points = channels(7, 1)
    assert torch.allclose(kmeans(points, 1).centres, points.double().mean(0, keepdim=True))
    assert kmeans(points, 7).objective[-1] < 1e-12


def test_no_group_stays_empty_where_points_coincide() -> None:
    points = torch.tensor([[0.0, 1.0]] * 20 + [[-9.0, 9.0], [-4.0, 1.0]])
    found = kmeans(points, 3)
    assert found.objective[-1] < 1e-12
    assert set(found.assignment.tolist()) == {0, 1, 2}


def test_more_groups_than_different_points_are_harmless() -> None:
    found = kmeans(torch.tensor([[0.0, 1.0]] * 6), 3)
    assert found.centres.isfinite().all()
    assert found.objective[-1] == 0


@pytest.mark.parametrize("step", [1e-9, 0.5])
def test_the_order_of_the_points_does_not_matter(step: float) -> None:
    """Also where activations lie on a grid, and many channels are equally wide."""
    points = (channels(200, 2) / step).round() * step
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    first, second = kmeans(points, 6), kmeans(points[order], 6)
    assert torch.equal(first.centres, second.centres)
    assert torch.equal(first.assignment[order], second.assignment)


def test_maxima_of_rows_are_points_of_one_dimension() -> None:
    maxima = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    found = kmeans(maxima, 4)
    assert found.centres.shape == (4, 1)
    assert (found.centres[1:] > found.centres[:-1]).all()


@pytest.mark.parametrize("groups", [0, 8])
def test_more_groups_than_points_are_refused(groups: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"groups={groups}: expected 1 to 7"):
        kmeans(channels(7, 0), groups)
