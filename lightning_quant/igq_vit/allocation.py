"""Allocation of groups to layers: an integer program over measured perturbations and a budget.

Source: Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024 (arXiv 2404.00928).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from lightning_quant.errors import ConfigurationError, QuantizationError

CANDIDATES = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24)
# A divergence is not negative, but the sum that computes it in FP32 may be.
ROUNDING = 1e-6
# HiGHS stops at an absolute gap of 1e-6, which SciPy cannot change: objectives are scaled to this size first.
_OBJECTIVE = 1e3
# Costs are scaled below this, where its tolerance of 1e-6 is far above the rounding of the sums.
_LARGEST_COST = 1e6

Table = Sequence[Mapping[int, float]]
Costs = Sequence[Mapping[int, int]]


@dataclass(frozen=True)
class BudgetPoint:
    """The best allocation for the budget of one uniform number of groups.

    Attributes:
        groups: Uniform number of groups, whose cost is the budget.
        budget: Budget in BOPs, or in groups.
        used: Cost of the allocation, at most the budget.
        omega: Sum of the perturbations of the allocation.
        uniform_omega: Sum of the perturbations with ``groups`` groups in every layer.
        choice: Number of groups of each layer.
    """

    groups: int
    budget: int
    used: int
    omega: float
    uniform_omega: float
    choice: tuple[int, ...]


def candidates(limit: int, also: int | None = None) -> tuple[int, ...]:
    """Return the numbers of groups to choose from, ascending.

    Args:
        limit: Maximum number of groups of a layer, which is its number of channels.
        also: Target average, which is always a candidate unless it exceeds the limit.

    Raises:
        ConfigurationError: Limit or target below 1.

    Example:
        >>> candidates(8, also=3)
        (1, 2, 3, 4, 6, 8)
    """
    if limit < 1 or (also is not None and also < 1):
        raise ConfigurationError(f"candidates({limit}, also={also}): expected numbers of at least 1.")
    numbers = {*CANDIDATES, *(() if also is None else (also,))}
    return tuple(sorted(groups for groups in numbers if groups <= limit))


def uniform(cost: Costs, groups: int) -> list[int]:
    """Return the same number of groups for every layer, or the next smaller candidate of a layer that lacks it.

    Raises:
        ConfigurationError: A layer has only larger candidates.

    Example:
        >>> uniform([{1: 10, 8: 20}, {1: 10, 2: 12}], 8)
        [8, 2]
    """
    smallest = [min(layer) for layer in cost]
    if smallest and groups < max(smallest):
        raise ConfigurationError(
            f"groups={groups} is below the smallest candidate of a layer: write groups={max(smallest)} or more."
        )
    return [max(candidate for candidate in layer if candidate <= groups) for layer in cost]


def budget_at(cost: Costs, groups: int) -> int:
    """Return the cost of the same number of groups in every layer, see :func:`uniform`.

    Example:
        >>> budget_at([{1: 10, 8: 20}, {1: 10, 2: 12}], 8)
        32
    """
    return _total(cost, uniform(cost, groups))


def allocate(omega: Table, cost: Costs, budget: int) -> list[int]:
    """Choose the numbers of groups that minimize the sum of the perturbations at a cost of at most ``budget``.

    The result is exact and deterministic: HiGHS solves an integer program to a gap of zero, and the solution is checked
    in integers. If two candidates of a layer have the same perturbation and cost, the one with fewer groups is chosen.

    Args:
        omega: Perturbations of each layer (mean KL divergences), keyed by number of groups.
        cost: Costs of each layer with the same keys: BOPs, or the numbers of groups themselves.
        budget: Maximum total cost of all layers.

    Returns:
        Number of groups of each layer.

    Raises:
        ConfigurationError: Tables that do not match, or a budget below the cost of the cheapest choice.
        QuantizationError: Perturbation that is NaN, infinite, or negative beyond rounding.

    Example:
        >>> allocate([{1: 9.0, 8: 1.0}, {1: 3.0, 8: 2.0}], [{1: 1, 8: 8}, {1: 1, 8: 8}], budget=9)
        [8, 1]
    """
    omega = _checked(omega, cost)
    least = sum(min(layer.values()) for layer in cost)
    if budget < least:
        raise ConfigurationError(
            f"budget={budget} cannot be met: the cheapest numbers of groups of the {len(cost)} layers cost {least} in"
            f" total. Write budget={least} or more, or a larger average of groups (softmax_groups)."
        )
    undominated = [_undominated(*tables) for tables in zip(omega, cost, strict=True)]
    return _solve(omega, cost, undominated, budget - least)


def budget_curve(omega: Table, cost: Costs) -> list[BudgetPoint]:
    """Compute the best allocation for the budget of each uniform number of groups, in ascending order.

    Raises:
        ConfigurationError: See :func:`allocate`.
        QuantizationError: See :func:`allocate`.

    Example:
        >>> omega, cost = [{1: 9.0, 2: 1.0, 3: 0.5}, {1: 3.0, 2: 2.0, 3: 2.0}], [{1: 1, 2: 2, 3: 3}] * 2
        >>> [(point.budget, point.choice, point.omega, point.uniform_omega) for point in budget_curve(omega, cost)]
        [(2, (1, 1), 12.0, 12.0), (4, (2, 2), 3.0, 3.0), (6, (3, 2), 2.5, 2.5)]
    """
    omega = _checked(omega, cost)
    fewest = max(min(layer) for layer in cost)
    points = []
    for groups in sorted({groups for layer in cost for groups in layer if groups >= fewest}):
        budget, same = budget_at(cost, groups), uniform(cost, groups)
        choice = allocate(omega, cost, budget)
        sums = [math.fsum(layer[g] for layer, g in zip(omega, chosen, strict=True)) for chosen in (choice, same)]
        points.append(BudgetPoint(groups, budget, _total(cost, choice), sums[0], sums[1], tuple(choice)))
    return points


def _total(cost: Costs, choice: Sequence[int]) -> int:
    return sum(layer[groups] for layer, groups in zip(cost, choice, strict=True))


def _checked(omega: Table, cost: Costs) -> list[dict[int, float]]:
    if len(omega) != len(cost) or not cost:
        raise ConfigurationError(
            f"omega has {len(omega)} layers and cost {len(cost)}: expected the same number, at least one."
        )
    for index, (perturbations, costs) in enumerate(zip(omega, cost, strict=True)):
        if perturbations.keys() != costs.keys() or not costs:
            raise ConfigurationError(
                f"Layer {index}: omega has groups {sorted(perturbations)} and cost {sorted(costs)}: expected the same"
                " candidates in both, at least one."
            )
        for groups, value in perturbations.items():
            if not -ROUNDING <= value < math.inf:
                raise QuantizationError(
                    f"Layer {index}: the perturbation with {groups} groups is {value}, expected a finite, non-negative"
                    " number. Check the activations of this layer and the float logits for NaN."
                )
    return [{groups: max(0.0, float(value)) for groups, value in layer.items()} for layer in omega]


def _undominated(omega: Mapping[int, float], cost: Mapping[int, int]) -> list[int]:
    """Drop the candidates that a cheaper one matches or beats; ties keep the fewest groups. Return cheapest first."""
    undominated: list[int] = []
    for groups in sorted(cost, key=lambda groups: (cost[groups], omega[groups], groups)):
        if not undominated or omega[groups] < omega[undominated[-1]]:
            undominated.append(groups)
    return undominated


def _solve(omega: Table, cost: Costs, options: Sequence[Sequence[int]], slack: int) -> list[int]:
    """Choose the best option of each layer, at a total cost of at most ``slack`` above that of the cheapest ones."""
    flat = [groups for layer in options for groups in layer]
    extra_cost = [layer[g] - layer[choices[0]] for layer, choices in zip(cost, options, strict=True) for g in choices]
    loss = [layer[g] - layer[choices[-1]] for layer, choices in zip(omega, options, strict=True) for g in choices]
    objective = np.array(loss) * (_OBJECTIVE / (max(loss) or 1.0))
    layers = np.repeat(np.arange(len(options)), [len(choices) for choices in options])
    one_each = csr_matrix((np.ones(len(flat)), (layers, np.arange(len(flat)))))
    # The costs of a network's layers share large factors. Without them they are small integers.
    unit = max(math.gcd(*extra_cost), max(extra_cost) / _LARGEST_COST) or 1
    cost_row = np.array([extra_cost], dtype=np.float64) / unit
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(cost_row, ub=slack / unit)]
    while True:
        chosen = _binary_program(objective, constraints)
        if sum(extra_cost[index] for index in chosen) <= slack:
            return [flat[index] for index in chosen]
        # Within the solver's tolerance, but over the budget in exact costs: exclude this one choice.
        constraints.append(
            LinearConstraint(np.isin(np.arange(len(flat)), chosen)[None].astype(float), ub=len(options) - 1)
        )


def _binary_program(objective: NDArray[np.float64], constraints: Sequence[LinearConstraint]) -> NDArray[np.int64]:
    """Solve the binary program, and return the indices of the variables that are 1."""
    solution = milp(
        objective,
        integrality=np.ones_like(objective),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if solution.status != 0:
        raise QuantizationError(f"HiGHS did not solve the allocation of groups: {solution.message}")
    return np.flatnonzero(solution.x > 0.5)
