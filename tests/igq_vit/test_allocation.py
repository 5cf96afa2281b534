"""The allocation of groups: exact, within the budget, and explained where it is impossible."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.igq_vit import allocation
from lightning_quant.igq_vit.allocation import CANDIDATES, allocate, budget_at, budget_curve, candidates, uniform
from lightning_quant.metrics.bops import fully_connected_bops

Table = list[dict[int, float]]
Costs = list[dict[int, int]]
Instance = tuple[Table, Costs]
# Of DeiT-B.
SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to four layers of up to four candidates, costs of any size that are in no order."""
    largest = draw(st.sampled_from([10, 10**6, 10**13]))
    value = st.one_of(st.integers(0, 5).map(float), st.floats(0, 10, allow_subnormal=False))
    omega: Table = []
    cost: Costs = []
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.lists(st.sampled_from(CANDIDATES), min_size=1, max_size=4, unique=True))
        omega.append({g: draw(value) for g in groups})
        cost.append({g: draw(st.integers(0, largest)) for g in groups})
    return omega, cost


def total(table: Sequence[Mapping[int, float]], choice: list[int]) -> float:
    return math.fsum(layer[groups] for layer, groups in zip(table, choice, strict=True))


def choices(omega: Table) -> list[list[int]]:
    return [list(choice) for choice in itertools.product(*omega)]


def network(layers: int, seed: int = 0, tokens: int = 197) -> Instance:
    """Perturbations that fall with the number of groups, not always, and the BOPs of DeiT-B's layers."""
    random = np.random.default_rng(seed)
    layers_of_blocks = itertools.islice(itertools.cycle(SHAPES), layers)
    cost = [
        {g: fully_connected_bops(tokens, inputs, outputs, 4, 4, groups=g) for g in CANDIDATES}
        for inputs, outputs in layers_of_blocks
    ]
    strength = np.exp(random.normal(size=layers)) * 1e-3
    omega = [{g: float(s / g * np.exp(0.1 * random.normal())) for g in CANDIDATES} for s in strength]
    return omega, cost


@given(instances(), st.data())
@settings(max_examples=150, deadline=None)
def test_is_the_best_of_all_choices_within_the_budget(instance: Instance, data: st.DataObject) -> None:
    omega, cost = instance
    every = choices(omega)
    # At a choice's exact cost, one below it and one above it, where a tolerance would be wrong.
    edge = int(total(cost, data.draw(st.sampled_from(every)))) + data.draw(st.integers(-1, 1))
    affordable = [choice for choice in every if total(cost, choice) <= edge]
    if not affordable:
        with pytest.raises(ConfigurationError, match="cannot be met"):
            allocate(omega, cost, edge)
        return
    chosen = allocate(omega, cost, edge)
    assert total(cost, chosen) <= edge
    best = min(total(omega, choice) for choice in affordable)
    assert total(omega, chosen) == pytest.approx(best, rel=1e-8, abs=1e-8)


@given(instances())
@settings(max_examples=30, deadline=None)
def test_a_larger_budget_is_never_worse(instance: Instance) -> None:
    omega, cost = instance
    budgets = sorted({int(total(cost, choice)) for choice in choices(omega)})[:6]
    sums = [total(omega, allocate(omega, cost, budget)) for budget in budgets]
    assert all(later <= earlier + 1e-8 for earlier, later in itertools.pairwise(sums))


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_within_budget_and_never_worse_than_uniform(seed: int) -> None:
    omega, cost = network(12, seed)
    points = budget_curve(omega, cost)
    assert [point.groups for point in points] == list(CANDIDATES)
    for point in points:
        assert point.budget == budget_at(cost, point.groups)
        assert point.used == total(cost, list(point.choice)) <= point.budget
        assert point.omega == total(omega, list(point.choice)) <= point.uniform_omega + 1e-12
        assert point.uniform_omega == total(omega, [point.groups] * 12)
    assert points[0].choice == (1,) * 12
    assert all(b.omega <= a.omega for a, b in itertools.pairwise(points))


def exact_optimum(omega: Table, cost: Costs, budget: int) -> float:
    """By dynamic programming over all costs in units of what they have in common."""
    extra = [{g: value - min(layer.values()) for g, value in layer.items()} for layer in cost]
    unit = math.gcd(*(value for layer in extra for value in layer.values()))
    size = (budget - sum(min(layer.values()) for layer in cost)) // unit + 1
    best = np.zeros(size)
    for perturbations, costs in zip(omega, extra, strict=True):
        after = np.full(size, np.inf)
        for groups, value in perturbations.items():
            used = costs[groups] // unit
            if used < size:
                after[used:] = np.minimum(after[used:], best[: size - used] + value)
        best = after
    return float(best[-1])


@pytest.mark.parametrize("groups", [2, 8, 12])
def test_48_layers_with_the_bops_of_a_real_network_are_solved_to_the_optimum(groups: int) -> None:
    omega, cost = network(48)
    budget = budget_at(cost, groups)
    assert budget > 10**11
    choice = allocate(omega, cost, budget)
    assert total(cost, choice) <= budget
    assert total(omega, choice) == pytest.approx(exact_optimum(omega, cost, budget), rel=1e-9)
    assert total(omega, choice) < total(omega, [groups] * 48)


def test_200_layers_are_solved_twice_the_same() -> None:
    omega, cost = network(200)
    choice = allocate(omega, cost, budget_at(cost, 8))
    assert total(cost, choice) <= budget_at(cost, 8)
    assert choice == allocate(omega, cost, budget_at(cost, 8))
    # The relaxation of the same program, by Lagrange's multiplier, bounds the optimum from below.
    bound = max(
        sum(min(o[g] + p * c[g] for g in o) for o, c in zip(omega, cost, strict=True)) - p * budget_at(cost, 8)
        for p in np.geomspace(1e-14, 1e-10, 1000)
    )
    assert bound <= total(omega, choice) <= bound * 1.01


def test_an_answer_of_the_solver_that_costs_too_much_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = allocation._binary_program
    calls = []

    def tolerant(objective: np.ndarray, constraints: list[object]) -> object:  # type: ignore[type-arg]
        calls.append(len(constraints))
        return solve(objective, [constraints[0], *constraints[2:]])  # type: ignore[list-item]

    monkeypatch.setattr(allocation, "_binary_program", tolerant)
    omega = [{1: 3.0, 2: 1.0}, {1: 2.0, 2: 1.0}]
    assert allocate(omega, [{1: 1, 2: 2}] * 2, budget=3) == [2, 1]
    assert calls == [2, 3]


def test_of_equals_the_fewest_groups_are_taken() -> None:
    flat = {1: 1.0, 2: 0.5, 8: 0.5, 24: 0.5}
    assert allocate([flat] * 3, [{g: g for g in flat}] * 3, budget=72) == [2, 2, 2]
    assert allocate([flat], [dict.fromkeys(flat, 7)], budget=7) == [2]
    assert allocate([{1: 0.0, 8: 0.0}], [{1: 1, 8: 8}], budget=8) == [1]


def test_more_groups_that_are_worse_are_not_taken() -> None:
    assert allocate([{1: 0.3, 2: 0.1, 4: 0.2}], [{1: 1, 2: 2, 4: 4}], budget=10) == [2]


def test_an_average_over_softmax_layers() -> None:
    omega = [{1: 1.0, 8: 0.5, 16: 0.1}, {1: 0.2, 8: 0.1, 16: 0.1}, {1: 0.2, 8: 0.1, 16: 0.1}]
    choice = allocate(omega, [{g: g for g in layer} for layer in omega], budget=3 * 8)
    assert choice == [16, 1, 1]


def test_a_budget_that_cannot_be_met_says_which_could() -> None:
    cost = [{2: 20, 4: 40}, {1: 5, 2: 9}]
    omega = [dict.fromkeys(layer, 1.0) for layer in cost]
    with pytest.raises(ConfigurationError, match=r"budget=24 cannot be met.*2 layers.*Write budget=25 or more"):
        allocate(omega, cost, 24)
    assert allocate(omega, cost, 25) == [2, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-3])
def test_a_perturbation_that_is_no_divergence_names_its_layer(value: float) -> None:
    omega = [{1: 0.5, 2: 0.1}, {1: 0.5, 2: value}]
    with pytest.raises(QuantizationError, match=rf"Layer 1: the perturbation with 2 groups is {value}"):
        allocate(omega, [{1: 1, 2: 2}] * 2, 4)


def test_a_negative_divergence_of_rounding_is_zero() -> None:
    # As 0 it is no better than the other, which has fewer groups.
    assert allocate([{1: 0.0, 2: -1e-8}], [{1: 1, 2: 2}], 2) == [1]


def test_tables_that_do_not_fit_say_so() -> None:
    with pytest.raises(ConfigurationError, match="omega has 1 layers and cost 2"):
        allocate([{1: 0.0}], [{1: 1}, {1: 1}], 2)
    with pytest.raises(ConfigurationError, match="omega has 0 layers"):
        budget_curve([], [])
    with pytest.raises(ConfigurationError, match=r"Layer 0: omega has groups \[1, 2\] and cost \[1\]"):
        allocate([{1: 0.0, 2: 0.0}], [{1: 1}], 2)


def test_candidates_are_capped_and_hold_the_target() -> None:
    assert candidates(1000) == CANDIDATES
    assert candidates(10, also=5) == (1, 2, 4, 5, 6, 8, 10)
    assert candidates(3, also=5) == (1, 2)
    with pytest.raises(ConfigurationError, match="at least 1"):
        candidates(0)
    with pytest.raises(ConfigurationError, match="also=0"):
        candidates(8, also=0)


def test_uniform_in_layers_of_few_channels() -> None:
    cost = [{g: g for g in candidates(limit, also=8)} for limit in (3, 8, 64)]
    assert uniform(cost, 8) == [2, 8, 8]
    assert budget_at(cost, 8) == 18
    with pytest.raises(ConfigurationError, match="write groups=4 or more"):
        uniform([{4: 1}, {1: 1}], 2)
