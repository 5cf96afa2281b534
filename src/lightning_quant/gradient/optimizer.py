"""What happens to the quantizers when an optimizer steps: intervals move, ranges take a step of Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_quant.errors import QuantizationError
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer
from lightning_quant.quantizers.statistics import all_reduce_sum


class QuantizerOptimizer:
    """Steps the quantizers of the layers that belong to one optimizer of the user's.

    All layers are stepped in a few vectorised operations, without reading a number on the host. Over several
    ranks, counts are summed and gradients of ranges averaged in one flat collective, so that ranks agree.

    Args:
        layers: by name.
        optimizer: the user's; the learning rate follows its schedule.
        lr: learning rate of Adam for the ranges, at the base learning rate of ``optimizer``.
    """

    def __init__(self, layers: dict[str, QuantizedLayer], optimizer: torch.optim.Optimizer, lr: float) -> None:
        self.optimizer = optimizer
        self.lr = lr
        self.base_lr = _base_lr(optimizer)
        self.steps = 0
        self.gradient_quantizers: dict[str, GradientQuantizer] = {}
        self.ranges: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if isinstance(layer.gradient_quantizer, GradientQuantizer):
                self.gradient_quantizers[name] = layer.gradient_quantizer
            for kind in ("input_quantizer", "weight_quantizer"):
                quantizer = getattr(layer, kind)
                if isinstance(quantizer, LearnedQuantizer):
                    self.ranges[f"{name}.{kind}"] = quantizer.range
        self.adam = torch.optim.Adam(list(self.ranges.values()), lr=lr, foreach=True) if self.ranges else None
        self.disagreement: Tensor | None = None

    @torch.no_grad()
    def step(self, gradient_scale: float = 1.0) -> None:
        """Move all intervals and ranges once.

        Args:
            gradient_scale: what the loss was multiplied with (by a gradient scaler).
        """
        counts = self._gather()
        if counts is not None:
            self._move_intervals(*counts)
        self._move_ranges(gradient_scale)

    def _gather(self) -> tuple[list[GradientQuantizer], Tensor, Tensor, Tensor] | None:
        """Quantizers that have started, their (layers,) clipped counts, totals and gammas, over all ranks."""
        active = [q for q in self.gradient_quantizers.values() if q.ready]
        learned = [r for r in self.ranges.values() if r.grad is not None]
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1:
            # All ranks must send the same: a range that had no gradient here sends zero.
            active, learned = list(self.gradient_quantizers.values()), list(self.ranges.values())
            _reduce_gradients_and_counts(active, learned, ranks)
        if not active:
            return None
        zero = torch.zeros((), dtype=torch.int64, device=active[0].gamma.device)
        clipped = torch.stack([zero if q.clipped is None else q.clipped for q in active])
        total = torch.stack([zero if q.total is None else q.total for q in active])
        return active, clipped, total, torch.stack([q.gamma for q in active])

    def _move_intervals(
        self, active: list[GradientQuantizer], clipped: Tensor, total: Tensor, gamma: Tensor
    ) -> None:
        interval = active[0].interval
        if interval.counts:
            target = gamma.new_tensor([interval.target(q.bits) for q in active])
            moved = interval.step(gamma, clipped / total.clamp_min(1), target)
            moved = torch.where(total > 0, moved, gamma)
            torch._foreach_copy_([q.gamma for q in active], list(moved.unbind()))
        self.steps += 1
        for quantizer in active:
            quantizer.clipped = quantizer.total = None
            quantizer.restarts = bool(interval.every) and self.steps % (interval.every or 1) == 0

    def _move_ranges(self, gradient_scale: float) -> None:
        if self.adam is None:
            return
        for group in self.adam.param_groups:
            group["lr"] = self.lr * self.optimizer.param_groups[0]["lr"] / self.base_lr
        learned = [r for r in self.ranges.values() if r.grad is not None]
        if learned:
            grads = torch.stack([r.grad for r in learned if r.grad is not None])
            grads = torch.nan_to_num(grads / gradient_scale, 0.0, 0.0, 0.0)
            for parameter, grad in zip(learned, grads.unbind(), strict=True):
                parameter.grad = grad
            self.adam.step()
            self.adam.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """State of Adam, and the base learning rate."""
        adam = None if self.adam is None else self.adam.state_dict()
        return {"names": list(self.ranges), "adam": adam, "base_lr": self.base_lr, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            QuantizationError: where the state is that of other layers.
        """
        if state["names"] != list(self.ranges):
            raise QuantizationError(
                f"The checkpoint holds the ranges of {len(state['names'])} tensors, this run learns {len(self.ranges)}:"
                " use the same include, exclude and first_and_last as the run that wrote it."
            )
        self.base_lr, self.steps = state["base_lr"], state["steps"]
        if self.adam is not None:
            self.adam.load_state_dict(state["adam"])


def _base_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that a schedule is a multiple of: the peak of a one-cycle, else what it started from."""
    group = optimizer.param_groups[0]
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _reduce_gradients_and_counts(quantizers: Sequence[GradientQuantizer], ranges: Sequence[Tensor], ranks: int) -> None:
    """Sum counts, average gammas and gradients of ranges over the ranks, in one collective."""
    device = ranges[0].device if ranges else quantizers[0].gamma.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    parts = [zero if q.clipped is None else q.clipped.double() for q in quantizers]
    parts += [zero if q.total is None else q.total.double() for q in quantizers]
    parts += [q.gamma.double() for q in quantizers]
    parts += [zero if r.grad is None else r.grad.double() for r in ranges]
    n = len(quantizers)
    clipped, total, gamma, grads = all_reduce_sum(torch.stack(parts)).split([n, n, n, len(ranges)])
    for i, quantizer in enumerate(quantizers):
        quantizer.clipped, quantizer.total = clipped[i], total[i]
        quantizer.gamma.copy_(gamma[i] / ranks)
    for i, parameter in enumerate(ranges):
        parameter.grad = (grads[i] / ranks).float()
