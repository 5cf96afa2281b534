"""The step of the quantizers: intervals move and ranges take a step of Adam when an optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_quant.errors import CheckpointError, QuantizationError
from lightning_quant.gradient.following import factors, own_sums, usual_size
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer
from lightning_quant.utilities.distributed import all_reduce_sum, several_ranks

# Ranks compute the same numbers from the same sums; more than this is another state.
TOLERANCE = 1e-4


class QuantizerOptimizer:
    """The optimizer of the quantizers of all layers whose weights one optimizer of the training holds.

    A few vectorized operations step all layers, without reading a number on the host. Over several
    ranks, counts are summed and gradients of ranges averaged in one flat collective, so that ranks agree.

    Args:
        layers: Quantized layers by name.
        optimizer: Optimizer of the weights. The learning rate of the ranges follows its schedule.
        lr: Learning rate of Adam for the ranges where ``optimizer`` is at its base learning rate.

    Example:
        >>> from lightning_quant.gradient import LargeGradientInterval
        >>> from lightning_quant.gradient.preparation import quantize_layers
        >>> from lightning_quant.nn import Bits
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> layers = quantize_layers(network, {"0": Bits(4, 4, 4)}, LargeGradientInterval())
        >>> user_optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> QuantizerOptimizer(layers, user_optimizer, lr=1e-5).step()
    """

    def __init__(self, layers: dict[str, QuantizedLayer], optimizer: torch.optim.Optimizer, lr: float) -> None:
        self.optimizer = optimizer
        self.lr = lr
        self.base_lrs = [_base_lr(group) for group in optimizer.param_groups]
        self.steps = 0
        self.gradient_quantizers: dict[str, GradientQuantizer] = {}
        self.ranges: dict[str, Tensor] = {}
        self._learned: list[LearnedQuantizer] = []
        usual: list[float] = []
        for name, layer in layers.items():
            if isinstance(layer.gradient_quantizer, GradientQuantizer):
                self.gradient_quantizers[name] = layer.gradient_quantizer
            for kind in ("input_quantizer", "weight_quantizer"):
                quantizer = getattr(layer, kind)
                if isinstance(quantizer, LearnedQuantizer):
                    self.ranges[f"{name}.{kind}"] = quantizer.range
                    self._learned.append(quantizer)
                    usual.append(usual_size(layer, kind))
        self.adam = torch.optim.Adam(list(self.ranges.values()), lr=lr, fused=True) if self.ranges else None
        device = self._learned[0].range.device if self._learned else None
        self._usual = torch.tensor(usual, device=device)
        self._followed = torch.zeros(len(usual), dtype=torch.int64, device=device)
        self._apart: Tensor | None = None

    @torch.no_grad()
    def step(self, gradient_scale: float | Tensor = 1.0) -> None:
        """Move all intervals and ranges once.

        Args:
            gradient_scale: Factor of the loss, by a gradient scaler.
        """
        quantizers = list(self.gradient_quantizers.values())
        counts = own_counts(quantizers, self._learned)
        if several_ranks():
            counts, apart = reduce_over_ranks(quantizers, list(self.ranges.values()), counts)
            self._apart = apart if self._apart is None else torch.maximum(self._apart, apart)
        self._move_intervals(quantizers, counts)
        self._move_ranges(gradient_scale)
        self._follow(counts)
        self.steps += 1
        for quantizer in quantizers:
            quantizer.run.reset_counts()
        for learned in self._learned:
            learned.sample = None
        self._mark_restarts()

    def _mark_restarts(self) -> None:
        for quantizer in self.gradient_quantizers.values():
            every = quantizer.interval.every
            quantizer.run.restarts = every is not None and self.steps > 0 and self.steps % every == 0

    def _schedule(self) -> float:
        """Return the factor of the schedule: that of the first parameter group that is not switched off.

        An optimizer without a learning rate (Adafactor) has no schedule that could be followed.
        """
        groups = self.optimizer.param_groups
        bases = self.base_lrs + [_base_lr(group) for group in groups[len(self.base_lrs) :]]
        if None in bases:
            return 1.0
        return next((float(group["lr"]) / base for group, base in zip(groups, bases, strict=False) if base), 0.0)

    def _move_intervals(self, quantizers: list[GradientQuantizer], counts: Counts) -> None:
        if not quantizers or not quantizers[0].interval.counts:
            return
        gamma = torch.stack([q.gamma for q in quantizers])
        target = torch.tensor([q.interval.target(q.bits) for q in quantizers]).to(gamma.device, non_blocking=True)
        moved = quantizers[0].interval.step(gamma, counts.clipped / counts.total.clamp_min(1), target)
        moved = torch.where(counts.total > 0, moved, gamma)
        torch._foreach_copy_([q.gamma for q in quantizers], list(moved.unbind()))

    def _move_ranges(self, gradient_scale: float | Tensor) -> None:
        learned = [r for r in self.ranges.values() if r.grad is not None]
        if self.adam is None or not learned:
            return
        grads = torch.stack([r.grad for r in learned if r.grad is not None]) / gradient_scale
        usable, before = grads.isfinite() & (grads != 0), torch.stack(learned)
        for parameter, grad in zip(learned, torch.where(usable, grads, 0.0).unbind(), strict=True):
            parameter.grad = grad
        self.adam.param_groups[0]["lr"] = self.lr * self._schedule()
        self.adam.step()
        self.adam.zero_grad()
        # Momentum moves a range also where its gradient is NaN, infinite or, of an empty batch, 0: it says nothing.
        torch._foreach_copy_(learned, list(torch.where(usable, torch.stack(learned), before).unbind()))

    def _follow(self, counts: Counts) -> None:
        if not self.ranges:
            return
        ranges = list(self.ranges.values())
        moved = factors(counts.values, torch.stack(ranges), self._usual)
        torch._foreach_mul_(ranges, list(moved.unbind()))
        self._followed += moved != 1

    def followed(self) -> dict[str, int]:
        """Count how often each range was doubled or halved to keep up with its tensor, if it was at all."""
        times = zip(self.ranges, self._followed.tolist(), strict=True)
        return {name: count for name, count in times if count}

    def check_agreement(self) -> None:
        """Check that the quantizers of all ranks have agreed since the last check.

        Raises:
            QuantizationError: A quantizer that is not, by its name.
        """
        if self._apart is None:
            return
        names = [f"{name}.gradient_quantizer" for name in self.gradient_quantizers] + list(self.ranges)
        for name, apart in zip(names, self._apart.tolist(), strict=True):
            if not apart <= TOLERANCE:
                raise QuantizationError(
                    f"Rank {dist.get_rank()}: the state of {name} is {apart:.1%} away from the mean over the ranks, so"
                    " they train different networks. Give all ranks the same checkpoint and callback arguments."
                )
        self._apart = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of Adam, the base learning rates and the number of steps."""
        adam = None if self.adam is None else self.adam.state_dict()
        return {
            "names": list(self.ranges),
            "adam": adam,
            "base_lrs": self.base_lrs,
            "steps": self.steps,
            "followed": self._followed.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: The state of other layers.
        """
        if state["names"] != list(self.ranges):
            raise CheckpointError(
                f"The checkpoint holds the ranges of {len(state['names'])} tensors, this run learns {len(self.ranges)}:"
                " use the same include, exclude and first_and_last as the run that wrote it."
            )
        self.base_lrs, self.steps = state["base_lrs"], state["steps"]
        self._mark_restarts()
        # States of older versions do not have it.
        self._followed.copy_(torch.tensor(state.get("followed", 0)))
        if self.adam is not None:
            self.adam.load_state_dict(state["adam"])


def _base_lr(group: dict[str, Any]) -> float | None:
    """Return the learning rate that a schedule multiplies: the peak of a one-cycle, else the first.

    None where the optimizer finds its own.
    """
    rate = group.get("max_lr", group.get("initial_lr", group.get("lr")))
    return None if rate is None else float(rate)


class Counts(NamedTuple):
    """Counts since the last step, FP64.

    Attributes:
        clipped: Gradients of each layer beyond its interval, (layers,).
        total: Gradients of each layer, (layers,).
        values: Sums over values of the tensors with learned ranges, (rows, ranges); see ``following.own_sums``.
    """

    clipped: Tensor
    total: Tensor
    values: Tensor


def own_counts(quantizers: Sequence[GradientQuantizer], learned: Sequence[LearnedQuantizer] = ()) -> Counts:
    """Collect the counts of this rank; zeros for layers that no gradient reached."""
    values = own_sums(learned)
    if not quantizers:
        return Counts(torch.zeros(0).double(), torch.zeros(0).double(), values)
    zero = torch.zeros((), dtype=torch.float64, device=quantizers[0].gamma.device)
    clipped = [zero if q.run.clipped is None else q.run.clipped.double() for q in quantizers]
    total = [zero if q.run.total is None else q.run.total.double() for q in quantizers]
    return Counts(torch.stack(clipped), torch.stack(total), values)


def reduce_over_ranks(
    quantizers: Sequence[GradientQuantizer], ranges: Sequence[Tensor], counts: Counts
) -> tuple[Counts, Tensor]:
    """Sum counts, average the gradients of ranges, and make intervals that just started equal.

    Args:
        quantizers: Gradient quantizers. Their gamma is set to the mean over the ranks that have started.
        ranges: Learned ranges. Their ``grad`` is set to the mean over ranks.
        counts: Counts of this rank.

    Returns:
        Counts over all ranks, and relative distances of this rank's state from the mean, (quantizers + ranges,).
    """
    ranks = dist.get_world_size()
    # Without a quantizer of gradients the counts know no device.
    device = next((tensor.device for tensor in (*(q.gamma for q in quantizers), *ranges)), counts.total.device)
    counts = Counts(*(part.to(device) for part in counts))
    gamma = torch.stack([q.gamma for q in quantizers]).double() if quantizers else counts.total
    zero = torch.zeros((), dtype=torch.float64, device=gamma.device)
    grads = [zero if r.grad is None else r.grad.double() for r in ranges]
    own = torch.stack([r.detach().double().nan_to_num(0.0) for r in ranges]) if ranges else zero[None][:0]
    gradients = torch.stack(grads) if ranges else zero[None][:0]
    parts = [
        counts.clipped,
        counts.total,
        gamma.nan_to_num(0.0),
        gamma.isfinite().double(),
        gradients,
        own,
        counts.values.flatten(),
    ]
    flat = all_reduce_sum(torch.cat(parts))
    clipped, total, gamma_sum, started, gradient, value, values = torch.split(flat, [len(p) for p in parts])

    mean = gamma_sum / started.clamp_min(1)
    # The first gradients differ from rank to rank, and so do the intervals that start from them.
    compared = torch.tensor([q.run.agreed for q in quantizers], device=gamma.device)
    apart = torch.where(compared, (gamma - mean).abs() / mean, 0.0) if quantizers else gamma
    distance = torch.cat([apart, (own - value / ranks).abs() / (value / ranks).abs().clamp_min(1e-30)])
    for i, quantizer in enumerate(quantizers):
        quantizer.ready = quantizer.ready or bool(started[i] > 0)
        if quantizer.ready:
            quantizer.gamma.copy_(mean[i])
            quantizer.run.agreed = True
    for i, parameter in enumerate(ranges):
        parameter.grad = (gradient[i] / ranks).float()
    return Counts(clipped, total, values.view_as(counts.values)), distance
