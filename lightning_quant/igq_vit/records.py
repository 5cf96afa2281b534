"""Tables in the record of a calibration: perturbations, costs and groups of each slot, read without the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_quant.calibration.record import Record, below
from lightning_quant.igq_vit.allocation import BudgetPoint, budget_curve
from lightning_quant.igq_vit.shortlist import combined

# Prefixes of entries, followed by the name of a layer and of its slot.
ESTIMATE, OMEGA, COST, GROUPS = "estimate/", "omega/", "cost/", "groups/"


def table(values: Mapping[int, float]) -> Tensor:
    """Pack values keyed by number of groups into a tensor (2, candidates): numbers of groups, then values."""
    return torch.tensor([list(values), list(values.values())], dtype=torch.float64).view(2, -1)


def tables_of(record: Record, kind: str) -> dict[str, dict[int, float]]:
    """Unpack the tables of one kind: values keyed by number of groups, for each slot.

    Example:
        >>> tables_of({"omega/head.input_quantizer": table({2: 0.5, 4: 0.25})}, OMEGA)
        {'head.input_quantizer': {2: 0.5, 4: 0.25}}
    """
    return {
        slot: {int(g): float(v) for g, v in sorted(value.T.tolist())} for slot, value in below(record, kind).items()
    }


def groups_of(record: Record) -> dict[str, int]:
    """Return the allocated number of groups of each slot."""
    return {slot: int(value) for slot, value in below(record, GROUPS).items()}


def curve_of(record: Record, kind: str) -> list[BudgetPoint]:
    """Compute the budget curve of all slots of a kind, see :func:`lightning_quant.igq_vit.allocation.budget_curve`.

    Perturbations that were not measured are estimated. Records written by older versions hold no costs and give an
    empty list.
    """
    estimates, costs = tables_of(record, ESTIMATE), tables_of(record, COST)
    omega = {slot: combined(estimates.get(slot, {}), measured) for slot, measured in tables_of(record, OMEGA).items()}
    slots = [slot for slot in omega if slot.endswith(f".{kind}") and slot in costs]
    cost = [{groups: int(value) for groups, value in costs[slot].items()} for slot in slots]
    return budget_curve([omega[slot] for slot in slots], cost) if slots else []
