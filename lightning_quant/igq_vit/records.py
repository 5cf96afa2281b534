"""What the record of a calibration says: perturbations, costs and groups of each slot, without the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_quant.calibration.record import Record, below
from lightning_quant.igq_vit.allocation import BudgetPoint, budget_curve
from lightning_quant.igq_vit.shortlist import combined

# Kinds of entries. Each ends with the name of a layer and of its slot.
ESTIMATE, OMEGA, COST, GROUPS = "estimate/", "omega/", "cost/", "groups/"


def table(values: Mapping[int, float]) -> Tensor:
    """(2, candidates): numbers of groups, and what each comes to."""
    return torch.tensor([list(values), list(values.values())], dtype=torch.float64).view(2, -1)


def tables_of(record: Record, kind: str) -> dict[str, dict[int, float]]:
    """What each number of groups comes to, by slot.

    Example:
        >>> tables_of({"omega/head.input_quantizer": table({2: 0.5, 4: 0.25})}, OMEGA)
        {'head.input_quantizer': {2: 0.5, 4: 0.25}}
    """
    return {
        slot: {int(g): float(v) for g, v in sorted(value.T.tolist())} for slot, value in below(record, kind).items()
    }


def groups_of(record: Record) -> dict[str, int]:
    """Groups by slot, where they were allocated."""
    return {slot: int(value) for slot, value in below(record, GROUPS).items()}


def curve_of(record: Record, kind: str) -> list[BudgetPoint]:
    """Points of the budget curve of all slots of a kind, see :func:`lightning_quant.igq_vit.allocation.budget_curve`.

    Of a record that an older version has written there are none. Perturbations that were not measured are estimated.
    """
    estimates, costs = tables_of(record, ESTIMATE), tables_of(record, COST)
    omega = {slot: combined(estimates.get(slot, {}), found) for slot, found in tables_of(record, OMEGA).items()}
    slots = [slot for slot in omega if slot.endswith(f".{kind}") and slot in costs]
    cost = [{groups: int(each) for groups, each in costs[slot].items()} for slot in slots]
    return budget_curve([omega[slot] for slot in slots], cost) if slots else []
