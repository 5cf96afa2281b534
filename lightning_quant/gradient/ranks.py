"""Ranks agree: counts, intervals and ranges over all processes, in one flat collective an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_quant.gradient.following import own_sums
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.quantizers import LearnedQuantizer
from lightning_quant.quantizers.statistics import all_reduce_sum


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
    """Counts of this rank; zeros for layers that no gradient reached."""
    values = own_sums(learned)
    if not quantizers:
        return Counts(torch.zeros(0).double(), torch.zeros(0).double(), values)
    zero = torch.zeros((), dtype=torch.float64, device=quantizers[0].gamma.device)
    clipped = [zero if q.clipped is None else q.clipped.double() for q in quantizers]
    total = [zero if q.total is None else q.total.double() for q in quantizers]
    return Counts(torch.stack(clipped), torch.stack(total), values)


def reduce_over_ranks(
    quantizers: Sequence[GradientQuantizer], ranges: Sequence[Tensor], counts: Counts
) -> tuple[Counts, Tensor]:
    """Sum counts, average the gradients of ranges, and make intervals that just started equal.

    Args:
        quantizers: of the gradients; their gamma is set to the mean over the ranks that have started.
        ranges: learned ranges; their ``grad`` is set to the mean over ranks.
        counts: this rank's.

    Returns:
        counts over all ranks, and how far this rank's state was from the mean before, (quantizers + ranges,) relative.
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
    compared = torch.tensor([q.agreed for q in quantizers], device=gamma.device)
    apart = torch.where(compared, (gamma - mean).abs() / mean, 0.0) if quantizers else gamma
    distance = torch.cat([apart, (own - value / ranks).abs() / (value / ranks).abs().clamp_min(1e-30)])
    for i, quantizer in enumerate(quantizers):
        quantizer.ready = quantizer.ready or bool(started[i] > 0)
        if quantizer.ready:
            quantizer.gamma.copy_(mean[i])
            quantizer.agreed = True
    for i, parameter in enumerate(ranges):
        parameter.grad = (gradient[i] / ranks).float()
    return Counts(clipped, total, values.view_as(counts.values)), distance
