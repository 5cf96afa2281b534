"""Which perturbations are worth a replay of the network, by their estimates: those that may change the allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm

from lightning_quant.igq_vit.allocation import Costs, Table

# Relative error of an estimate, which is of second order.
SPREAD = 0.2


def expected_gains(estimates: Table, cost: Costs, budget: int) -> list[dict[int, float]]:
    """How much lower the sum of the perturbations is expected to get if a candidate is measured, for each layer.

    A candidate that would cost too much for what it gains by its estimate is the better one only if the estimates are
    wrong: the expected improvement over the layer's best, at the price of the budget.

    Args:
        estimates: Perturbation by number of groups, for each layer.
        cost: Costs of the same numbers of groups.
        budget: Most that all layers may cost together.

    Example:
        >>> (gains,) = expected_gains([{1: 1.0, 2: 0.9, 4: 0.1}], [{1: 1, 2: 2, 4: 4}], budget=4)
        >>> gains[4] > gains[2] > gains[1]
        True
    """
    price = _price(estimates, cost, budget)
    gains = []
    for perturbations, costs in zip(estimates, cost, strict=True):
        best = _cheapest(perturbations, costs, price)
        regret = {g: p + price * costs[g] - perturbations[best] - price * costs[best] for g, p in perturbations.items()}
        errors = {g: SPREAD * float(np.hypot(p, perturbations[best])) or 1e-300 for g, p in perturbations.items()}
        gains.append(
            {g: float(errors[g] * norm.pdf(r / errors[g]) - r * norm.sf(r / errors[g])) for g, r in regret.items()}
        )
    return gains


def shortlist(gains: Sequence[Mapping[int, float]], passes: Sequence[float], limit: float) -> list[list[int]]:
    """Candidates of each layer to measure: those that gain most for their passes, until these reach a limit.

    Args:
        gains: From :func:`expected_gains`.
        passes: Share of the network that a measurement runs, for each layer.
        limit: Most that all measurements may take together.

    Example:
        >>> shortlist([{1: 0.0, 8: 0.3}, {1: 0.1, 8: 0.2}], passes=[1.0, 0.5], limit=2.0)
        [[8], [1, 8]]
    """
    ordered = sorted(
        (-gain / passes[layer], layer, groups) for layer, each in enumerate(gains) for groups, gain in each.items()
    )
    chosen: list[list[int]] = [[] for _ in gains]
    for _, layer, groups in ordered:
        limit -= passes[layer]
        if limit < 0:
            break
        chosen[layer].append(groups)
    return [sorted(each) for each in chosen]


def combined(estimates: Mapping[int, float], measured: Mapping[int, float]) -> dict[int, float]:
    """What is known of a layer: what was measured, the rest estimated in proportion to it.

    Example:
        >>> combined({1: 4.0, 8: 2.0}, {8: 1.0})
        {1: 2.0, 8: 1.0}
        >>> combined({}, {8: 1.0})
        {8: 1.0}
    """
    estimated = sum(estimates.get(groups, 0.0) for groups in measured)
    factor = sum(measured.values()) / estimated if estimated > 0 else 1.0
    return {groups: estimate * factor for groups, estimate in estimates.items()} | dict(measured)


def _price(estimates: Table, cost: Costs, budget: int) -> float:
    """Perturbation that a unit of cost is worth: the least at which the layers, each for itself, keep the budget."""

    def kept(price: float) -> bool:
        layers = zip(estimates, cost, strict=True)
        return sum(costs[_cheapest(omega, costs, price)] for omega, costs in layers) <= budget

    low, high = 0.0, max(max(omega.values()) for omega in estimates) or 1.0
    if kept(low):
        return low
    # A unit of cost is at least 1: no layer pays more than all of its perturbation for it.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def _cheapest(omega: Mapping[int, float], cost: Mapping[int, int], price: float) -> int:
    return min(omega, key=lambda groups: (omega[groups] + price * cost[groups], cost[groups], groups))
