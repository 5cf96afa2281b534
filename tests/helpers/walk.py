"""A calibration of six steps, for tests of what goes around one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_quant.calibration.record import STEPS
from lightning_quant.errors import CheckpointError
from lightning_quant.quantizers import FixedQuantizer

TOTAL = 6


class Walk:
    """Each step takes a number on; its file is worth writing at every second, and it may end before the last."""

    total = TOTAL

    def __init__(self, layer: nn.Module, end: int = TOTAL, kind: str = "walk") -> None:
        self.layer, self.end, self.kind = layer, end, kind
        self.taken = 0
        self.value = torch.tensor([[0.3]], dtype=torch.float32)
        self.calls: list[int] = []
        self.worth_saving = False

    @property
    def done(self) -> int:
        return TOTAL if self.finished else self.taken

    @property
    def finished(self) -> bool:
        return self.taken >= self.end

    def replay(self) -> None:
        """It has no data."""

    def step(self, advance: Callable[[str], None] = lambda name: None) -> str:
        # A product, which autocast would round, and a new tensor, which takes the default type.
        self.value = torch.cos(3 * self.value @ torch.tensor([[1.1]]) + self.taken)
        quantizer = self.layer.weight_quantizer
        assert isinstance(quantizer, FixedQuantizer)
        quantizer.initialize(self.value.expand(2, 2) + 2)
        self.calls.append(self.taken)
        self.taken += 1
        self.worth_saving = self.taken % 2 == 0
        return f"step {self.taken}"

    def record(self) -> dict[str, Tensor]:
        return {STEPS: torch.tensor([self.done, self.total])}

    def state_dict(self) -> dict[str, Tensor]:
        taken = {"taken": torch.tensor(self.taken), "value": self.value}
        return {self.kind: torch.tensor(True), **self.record(), **taken}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.kind not in state:
            raise CheckpointError("The calibration that is to be continued was another.")
        self.taken, self.value = int(state["taken"]), state["value"].clone()
        self.layer.weight_quantizer.initialize(self.value.expand(2, 2) + 2)  # type: ignore[operator,union-attr]
