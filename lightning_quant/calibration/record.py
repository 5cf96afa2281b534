"""Record of a calibration for the report: a few small tensors with flat names, which fit in any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Record = Mapping[str, Tensor]
"""Tensors with names ``kind/what``. ``steps`` holds the completed steps and their total."""

# Keys of a record: completed steps and total; the plan, as text; the settings, as JSON.
STEPS, PLAN, SETTINGS = "steps", "plan", "settings"


def begin_record(done: int, total: int, plan: object, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Create the entries that records of all methods share.

    Example:
        >>> record = begin_record(3, 3, "a plan", {"groups": 8})
        >>> plan_of(record), settings_of(record), is_finished(record)
        ('a plan', {'groups': 8}, True)
    """
    texts = {PLAN: str(plan), SETTINGS: json.dumps(settings)}
    packed = {key: torch.tensor(list(text.encode()), dtype=torch.uint8) for key, text in texts.items()}
    return {STEPS: torch.tensor([done, total]), **packed}


def is_finished(record: Record) -> bool:
    """Return whether the calibration was finished. An empty record counts as unfinished."""
    if STEPS not in record:
        return False
    done, total = record[STEPS].tolist()
    return bool(done == total)


def plan_of(record: Record) -> str:
    """Return the plan of what was quantized, or an empty string if the record has none."""
    return _text(record, PLAN)


def settings_of(record: Record) -> dict[str, Any]:
    """Return the arguments of the calibration, or an empty dict if the record has none."""
    settings: dict[str, Any] = json.loads(_text(record, SETTINGS) or "{}")
    return settings


def below(record: Record, prefix: str) -> dict[str, Tensor]:
    """Return the entries with a prefix, keyed by the rest of their names, in arbitrary order.

    Example:
        >>> below({"error/end": torch.zeros(1), "sweep/4": torch.zeros(1)}, "error/")
        {'end': tensor([0.])}
    """
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def numbered(record: Record, prefix: str) -> dict[int, Tensor]:
    """Return the entries with a prefix, keyed by their numbers, smallest first.

    Files of safetensors return names sorted as text.

    Args:
        record: Record or state, in any order.
        prefix: Prefix of the names.

    Example:
        >>> list(numbered({"check/100": torch.zeros(1), "check/20": torch.zeros(1)}, "check/"))
        [20, 100]
    """
    return dict(sorted((int(name), value) for name, value in below(record, prefix).items()))


def _text(record: Record, key: str) -> str:
    return bytes(record[key].tolist()).decode() if key in record else ""


class StepwiseCalibration(Protocol):
    """Interface of a calibration in steps, whose state holds all that it has computed.

    An optional attribute ``worth_saving`` tells whether to save a file after the last step. Without it, every step is
    saved.
    """

    @property
    def total(self) -> int:
        """Total number of steps: an upper bound if the calibration may stop early."""

    @property
    def done(self) -> int:
        """Number of completed steps: the total if it has finished early."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""

    def replay(self) -> object:
        """Call the network on the data that it was calibrated on."""

    def step(self, advance: Callable[[str], None] = ...) -> str:
        """Run the next step and describe it in a few words. A long step passes the name of each part to ``advance``."""

    def record(self) -> dict[str, Tensor]:
        """Return the record for the report, see :mod:`lightning_quant.calibration.record`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that was computed, with flat names, including the record."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a state. Raises a CheckpointError if the state belongs to something else."""
