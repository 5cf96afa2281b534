"""How many groups each layer gets: the integer program over measured perturbations and a budget.

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
# HiGHS stops at an absolute gap of 1e-6, which SciPy cannot set: objectives are brought to this size before.
_OBJECTIVE = 1e3
# And costs to less than this, where its tolerance of 1e-6 is far above the rounding of the sums.
_LARGEST_COST = 1e6

Table = Sequence[Mapping[int, float]]
Costs = Sequence[Mapping[int, int]]


@dataclass(frozen=True)
class BudgetPoint:
    """The best allocation for the budget of one uniform number of groups.

    Attributes:
        groups: the uniform number of groups that sets the budget.
        budget: what it costs (BOPs, or groups).
        used: what the allocation costs, at most the budget.
        omega: sum of the perturbations of the allocation.
        uniform_omega: sum of the perturbations with ``groups`` groups in every layer.
        choice: groups of each layer.
    """

    groups: int
    budget: int
    used: int
    omega: float
    uniform_omega: float
    choice: tuple[int, ...]


def candidates(limit: int, also: int | None = None) -> tuple[int, ...]:
    """Numbers of groups to choose from, ascending.

    Args:
        limit: the most a layer can have, its number of channels.
        also: the target average, which is always among them where the limit permits.

    Raises:
        ConfigurationError: a limit or a target below 1.

    Example:
        >>> candidates(8, also=3)
        (1, 2, 3, 4, 6, 8)
    """
    if limit < 1 or (also is not None and also < 1):
        raise ConfigurationError(f"candidates({limit}, also={also}): expected numbers of at least 1.")
    known = {*CANDIDATES, *(() if also is None else (also,))}
    return tuple(sorted(groups for groups in known if groups <= limit))


def uniform(cost: Costs, groups: int) -> list[int]:
    """The same number of groups in every layer, or the most that a layer with fewer candidates has.

    Raises:
        ConfigurationError: a layer all of whose candidates are above it.

    Example:
        >>> uniform([{1: 10, 8: 20}, {1: 10, 2: 12}], 8)
        [8, 2]
    """
    smallest = [min(layer) for layer in cost]
    if smallest and groups < max(smallest):
        raise ConfigurationError(
            f"groups={groups} is below the fewest of a layer: give groups={max(smallest)} or more."
        )
    return [max(candidate for candidate in layer if candidate <= groups) for layer in cost]


def budget_at(cost: Costs, groups: int) -> int:
    """Cost of the same number of groups in every layer, see :func:`uniform`.

    Example:
        >>> budget_at([{1: 10, 8: 20}, {1: 10, 2: 12}], 8)
        32
    """
    return _total(cost, uniform(cost, groups))


def allocate(omega: Table, cost: Costs, budget: int) -> list[int]:
    """Numbers of groups that minimize the sum of the perturbations at a cost of at most ``budget``.

    Exact and deterministic: an integer program, solved by HiGHS to a gap of zero, whose answer is checked in integers.
    Of two candidates of a layer that are equally good at the same cost the one with fewer groups is taken.

    Args:
        omega: for each layer the perturbation by number of groups (a mean KL divergence).
        cost: for each layer what they cost, for the same numbers of groups: BOPs, or the numbers themselves.
        budget: most that all layers may cost together.

    Returns:
        The number of groups of each layer.

    Raises:
        ConfigurationError: tables that do not fit each other, or a budget below that of the cheapest choice.
        QuantizationError: a perturbation that is NaN, infinite or negative beyond rounding.

    Example:
        >>> allocate([{1: 9.0, 8: 1.0}, {1: 3.0, 8: 2.0}], [{1: 1, 8: 8}, {1: 1, 8: 8}], budget=9)
        [8, 1]
    """
    omega = _checked(omega, cost)
    least = sum(min(layer.values()) for layer in cost)
    if budget < least:
        raise ConfigurationError(
            f"budget={budget} cannot be met: the cheapest number of groups in every one of {len(cost)} layers costs"
            f" {least} together. Give budget={least} or more, or more groups (softmax_groups) on average."
        )
    kept = [_undominated(*tables) for tables in zip(omega, cost, strict=True)]
    return _solve(omega, cost, kept, budget - least)


def budget_curve(omega: Table, cost: Costs) -> list[BudgetPoint]:
    """The best allocation for the budget of each uniform number of groups, ascending.

    Raises:
        ConfigurationError: see :func:`allocate`.
        QuantizationError: see :func:`allocate`.

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
            f"omega has {len(omega)} layers and cost {len(cost)}: expected the same layers, at least one."
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
                    f"Layer {index}: the perturbation with {groups} groups is {value}, expected a finite number that"
                    " is not negative: look for NaN in the activations of this layer and in the float logits."
                )
    return [{groups: max(0.0, float(value)) for groups, value in layer.items()} for layer in omega]


def _undominated(omega: Mapping[int, float], cost: Mapping[int, int]) -> list[int]:
    """Candidates, cheapest first, each of which is better than every cheaper one: of equals, that of fewest groups."""
    kept: list[int] = []
    for groups in sorted(cost, key=lambda groups: (cost[groups], omega[groups], groups)):
        if not kept or omega[groups] < omega[kept[-1]]:
            kept.append(groups)
    return kept


def _solve(omega: Table, cost: Costs, kept: Sequence[Sequence[int]], slack: int) -> list[int]:
    """Of one candidate kept in each layer, the best ones that together cost at most ``slack`` above the cheapest."""
    flat = [groups for layer in kept for groups in layer]
    above = [layer[g] - layer[chosen[0]] for layer, chosen in zip(cost, kept, strict=True) for g in chosen]
    worse = [layer[g] - layer[chosen[-1]] for layer, chosen in zip(omega, kept, strict=True) for g in chosen]
    objective = np.array(worse) * (_OBJECTIVE / (max(worse) or 1.0))
    layers = np.repeat(np.arange(len(kept)), [len(chosen) for chosen in kept])
    one_each = csr_matrix((np.ones(len(flat)), (layers, np.arange(len(flat)))))
    # Costs of the layers of a network have large factors in common: without them they are small integers again.
    unit = max(math.gcd(*above), max(above) / _LARGEST_COST) or 1
    within = np.array([above], dtype=np.float64) / unit
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(within, ub=slack / unit)]
    while True:
        chosen = _binary_program(objective, constraints)
        if sum(above[index] for index in chosen) <= slack:
            return [flat[index] for index in chosen]
        # Within the solver's tolerance, but too expensive by the exact costs: this one choice is excluded.
        constraints.append(
            LinearConstraint(np.isin(np.arange(len(flat)), chosen)[None].astype(float), ub=len(kept) - 1)
        )


def _binary_program(objective: NDArray[np.float64], constraints: Sequence[LinearConstraint]) -> NDArray[np.int64]:
    """Indices of the variables that are 1 in the optimum."""
    answer = milp(
        objective,
        integrality=np.ones_like(objective),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if answer.status != 0:
        raise QuantizationError(f"HiGHS did not solve the allocation of groups: {answer.message}")
    return np.flatnonzero(answer.x > 0.5)
