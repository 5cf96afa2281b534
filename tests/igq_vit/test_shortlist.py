"""Which perturbations are measured: within a limit of passes, and those that decide the allocation."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_quant.igq_vit.allocation import CANDIDATES, allocate, budget_at
from lightning_quant.igq_vit.shortlist import combined, expected_gains, shortlist

LAYERS = 40


@pytest.mark.parametrize("seed", range(4))
def test_few_measurements_find_the_allocation_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    cost = [{g: int(c * (10 + g)) for g in CANDIDATES} for c in random.integers(1, 9, LAYERS)]
    # As measured: the number of groups explains a part, the rest is different in each layer.
    strength = np.exp(random.normal(size=LAYERS))
    omega = [{g: float(s * np.exp(0.5 * random.normal()) / g**0.5) for g in CANDIDATES} for s in strength]
    estimates = [{g: v * float(np.exp(0.1 * random.normal())) for g, v in layer.items()} for layer in omega]
    budget, passes = budget_at(cost, 8), np.linspace(1, 1 / LAYERS, LAYERS).tolist()
    chosen = shortlist(expected_gains(estimates, cost, budget), passes, limit=2 * sum(passes))
    assert sum(p * len(each) for p, each in zip(passes, chosen, strict=True)) <= 2 * sum(passes)
    measured = [{g: layer[g] for g in each} for layer, each in zip(omega, chosen, strict=True)]
    known = [combined(*each) for each in zip(estimates, measured, strict=True)]

    def objective(table: list[dict[int, float]]) -> float:
        return sum(layer[g] for layer, g in zip(omega, allocate(table, cost, budget), strict=True))

    assert objective(omega) <= objective(known) <= 1.01 * objective(omega)
    # What the measurements are for.
    assert objective(known) <= objective(estimates)


def test_a_limit_that_is_never_reached_leaves_nothing_out() -> None:
    estimates, cost = [{1: 2.0, 4: 1.0, 8: 0.0}], [{1: 1, 4: 4, 8: 8}]
    for budget in (1, 4, 8):
        assert shortlist(expected_gains(estimates, cost, budget), [1.0], 3.0) == [[1, 4, 8]]


def test_measurements_correct_the_estimates_that_are_left() -> None:
    assert combined({1: 4.0, 2: 2.0, 8: 1.0}, {1: 2.0, 2: 1.0}) == {1: 2.0, 2: 1.0, 8: 0.5}
    assert combined({1: 4.0, 2: 0.0}, {2: 1.0}) == {1: 4.0, 2: 1.0}
    assert combined({1: 4.0}, {}) == {1: 4.0}
