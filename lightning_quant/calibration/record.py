"""What a calibration leaves behind for a report: few and small tensors by flat names, which any checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Record = Mapping[str, Tensor]
"""Tensors by names ``kind/what``; ``steps`` holds steps done and their total."""

# In a record, how many steps are done, and of how many; what was quantized, as text; with what, as JSON.
STEPS, PLAN, SETTINGS = "steps", "plan", "settings"


def begin_record(done: int, total: int, plan: object, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What records of all methods hold.

    Example:
        >>> record = begin_record(3, 3, "a plan", {"groups": 8})
        >>> plan_of(record), settings_of(record), is_finished(record)
        ('a plan', {'groups': 8}, True)
    """
    texts = {PLAN: str(plan), SETTINGS: json.dumps(settings)}
    packed = {key: torch.tensor(list(text.encode()), dtype=torch.uint8) for key, text in texts.items()}
    return {STEPS: torch.tensor([done, total]), **packed}


def is_finished(record: Record) -> bool:
    """Whether the calibration was, when the record was made; of nothing it was not."""
    if STEPS not in record:
        return False
    done, total = record[STEPS].tolist()
    return bool(done == total)


def plan_of(record: Record) -> str:
    """What was quantized; empty where the record does not say."""
    return _text(record, PLAN)


def settings_of(record: Record) -> dict[str, Any]:
    """The arguments of the calibration; empty where the record does not say."""
    found: dict[str, Any] = json.loads(_text(record, SETTINGS) or "{}")
    return found


def below(record: Record, prefix: str) -> dict[str, Tensor]:
    """The entries of a kind, by what follows it, in an order that means nothing.

    Example:
        >>> below({"error/end": torch.zeros(1), "sweep/4": torch.zeros(1)}, "error/")
        {'end': tensor([0.])}
    """
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def numbered(record: Record, prefix: str) -> dict[int, Tensor]:
    """Return the entries of a kind that go by numbers, the smallest first.

    Files of safetensors give names back sorted as text.

    Args:
        record: Record or state, in any order.
        prefix: Kind of the entries.

    Example:
        >>> list(numbered({"check/100": torch.zeros(1), "check/20": torch.zeros(1)}, "check/"))
        [20, 100]
    """
    return dict(sorted((int(name), value) for name, value in below(record, prefix).items()))


def _text(record: Record, key: str) -> str:
    return bytes(record[key].tolist()).decode() if key in record else ""


class StepwiseCalibration(Protocol):
    """What is calibrated step by step; all that it has computed is in its state.

    It may have ``worth_saving``, whether the step that was done last is worth a file; without, each is.
    """

    @property
    def total(self) -> int:
        """How many steps there are; more than will be needed, where it may stop early."""

    @property
    def done(self) -> int:
        """How many steps are done; all, when it has finished early."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""

    def replay(self) -> object:
        """Call the network on the data that it was calibrated on."""

    def step(self, advance: Callable[[str], None] = ...) -> str:
        """Do the next step, and return what was done in a few words; ``advance`` is told of parts of a long one."""

    def record(self) -> dict[str, Tensor]:
        """What a report shows of it, see :mod:`lightning_quant.calibration.record`."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that was computed, by flat names, the record included."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state; a CheckpointError where it is of something else."""
