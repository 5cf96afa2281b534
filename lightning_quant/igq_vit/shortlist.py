"""Shortlist of the perturbations to measure by replay: those that may change the allocation, by their estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm

from lightning_quant.igq_vit.allocation import Costs, Table

# Relative error of a second-order estimate.
SPREAD = 0.2


def expected_gains(estimates: Table, cost: Costs, budget: int) -> list[dict[int, float]]:
    """Compute the expected decrease of the sum of perturbations from measuring each candidate of each layer.

    It is the expected improvement over the layer's best candidate, at the price of the budget: a candidate that is too
    expensive for its estimated gain can still win if the estimates are wrong.

    Args:
        estimates: Perturbations of each layer, keyed by number of groups.
        cost: Costs of each layer with the same keys.
        budget: Maximum total cost of all layers.

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
    """Select the candidates to measure: those with the largest gain per pass, until the passes reach a limit.

    Args:
        gains: Expected gains from :func:`expected_gains`.
        passes: Cost of a measurement in each layer, as a share of a forward pass.
        limit: Maximum number of forward passes of all measurements.

    Example:
        >>> shortlist([{1: 0.0, 8: 0.3}, {1: 0.1, 8: 0.2}], passes=[1.0, 0.5], limit=2.0)
        [[8], [1, 8]]
    """
    ordered = sorted(
        (-gain / passes[layer], layer, groups) for layer, table in enumerate(gains) for groups, gain in table.items()
    )
    chosen: list[list[int]] = [[] for _ in gains]
    for _, layer, groups in ordered:
        limit -= passes[layer]
        if limit < 0:
            break
        chosen[layer].append(groups)
    return [sorted(groups) for groups in chosen]


def combined(estimates: Mapping[int, float], measured: Mapping[int, float]) -> dict[int, float]:
    """Merge measured perturbations of a layer with estimates of the others, rescaled to match the measurements.

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
    """Find the smallest price per unit of cost at which the independent choices of all layers fit the budget."""

    def within_budget(price: float) -> bool:
        layers = zip(estimates, cost, strict=True)
        return sum(costs[_cheapest(omega, costs, price)] for omega, costs in layers) <= budget

    low, high = 0.0, max(max(omega.values()) for omega in estimates) or 1.0
    if within_budget(low):
        return low
    # Costs are integers, so no layer pays a price above the largest perturbation for one more unit.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if within_budget(middle) else (middle, high)
    return high


def _cheapest(omega: Mapping[int, float], cost: Mapping[int, int], price: float) -> int:
    return min(omega, key=lambda groups: (omega[groups] + price * cost[groups], cost[groups], groups))
