"""Second-order estimate of how much quantizing one activation moves the posteriors, for all layers at once.

A small change d of an activation moves the posteriors p by KL = 1/2 sum_c p_c (d . grad log p_c)^2. The gradients do
not depend on d, so one forward pass and a few backward passes serve all layers and all numbers of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.igq_vit.calibration_pass import Slot, fill
from lightning_quant.igq_vit.schemes import Candidates
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.grouped import InstanceQuantizer
from lightning_quant.utilities.distributed import all_reduce_sum

# Number of backward passes: one for each of the most likely classes of an image, the last for all other classes.
PROBES = 8
# Limit on the values of activations and gradients held at a time, about 0.5 GB, which sets the images per batch.
HELD_VALUES = 2**27


class Tap(InstanceQuantizer):
    """Identity in a slot that records its input as a tensor with a gradient.

    Attributes:
        recorded: Input of the last forward.
    """

    recorded: Tensor

    def __init__(self) -> None:
        super().__init__(bits=16)
        self.ready = True

    def forward(self, x: Tensor) -> Tensor:
        """Return a view, whose gradient belongs to this slot alone even if several layers share the input."""
        x = x if x.requires_grad else x.detach().requires_grad_()
        self.recorded = x.view_as(x)
        return self.recorded


def estimated_perturbations(
    network: nn.Module,
    run: Callable[[Tensor], Any],
    images: Tensor,
    candidates: Mapping[Slot, Candidates],
    posteriors: Callable[[Any], Tensor],
) -> dict[Slot, dict[int, float]]:
    """Estimate Omega of all layers for each number of groups.

    Args:
        network: Network in float, all slots empty.
        run: Forward of the network that gradients flow through.
        images: Calibration images of this rank (n, C, H, W).
        candidates: Quantizers of each slot, keyed by number of groups.
        posteriors: Function from outputs to log-probabilities (items, classes).

    Returns:
        Divergences averaged over the items of all ranks; empty if the log-probabilities have no gradient.
    """
    sums = torch.zeros(1 + sum(map(len, candidates.values())), dtype=torch.float64, device=images.device)
    size = 1
    with _tapped(network, candidates) as taps:
        while len(images):
            part, images = images[:size], images[size:]
            with torch.enable_grad():
                log_p = posteriors(run(part))
            if not log_p.requires_grad:
                return {}
            sums[0] += len(log_p)
            sums[1:] += (
                torch.stack([square for row in _squares(log_p, len(part), taps, candidates) for square in row]) / 2
            )
            values = sum(tap.recorded.numel() for tap in taps.values()) // len(part)
            size = max(1, HELD_VALUES // (values * (PROBES + 1)))
    count, *totals = all_reduce_sum(sums).tolist()
    means = (total / count for total in totals)
    return {slot: {groups: next(means) for groups in quantizers} for slot, quantizers in candidates.items()}


@contextmanager
def _tapped(network: nn.Module, slots: Iterable[Slot]) -> Iterator[dict[Slot, Tap]]:
    taps = {slot: Tap() for slot in slots}
    try:
        fill(network, taps)
        yield taps
    finally:
        fill(network, dict.fromkeys(taps))


def _squares(
    log_p: Tensor, images: int, taps: Mapping[Slot, Tap], candidates: Mapping[Slot, Candidates]
) -> Iterator[list[Tensor]]:
    """Yield, for each slot, the squared changes of the probed sums, summed over probes and images, per candidate."""
    probes = _probes(log_p.detach(), images)
    inputs = [tap.recorded for tap in taps.values()]
    passes = [torch.autograd.grad(log_p, inputs, probe, retain_graph=True, materialize_grads=True) for probe in probes]
    for (slot, tap), gradients in zip(taps.items(), zip(*passes, strict=True), strict=True):
        gradient = torch.stack([by_probe.float().reshape(images, -1) for by_probe in gradients])
        yield [
            torch.einsum("pin,in->pi", gradient, _change(quantizer, tap, images)).double().square().sum()
            for quantizer in candidates[slot].values()
        ]


def _change(quantizer: Quantizer, tap: Tap, images: int) -> Tensor:
    """Compute the change (images, values) that a quantizer makes to a recorded input."""
    x = tap.recorded.detach()
    if isinstance(quantizer, InstanceQuantizer):
        quantizer.instances = tap.instances
    try:
        change: Tensor = quantizer(x).float() - x.float()
        return change.reshape(images, -1)
    finally:
        if isinstance(quantizer, InstanceQuantizer):
            quantizer.instances = None


def _probes(log_p: Tensor, images: int) -> Tensor:
    """Create weights z (probes, items, classes) for which the mean of sum z z^T is diag(p) of each item.

    Each of the most likely classes of an item has a probe of its own, and the last probe holds all others. Random signs
    separate these classes, and the items of an image, in the mean. They are the same for every image, so that the
    result does not depend on how images are batched.
    """
    items, classes = log_p.shape
    count, places = min(PROBES, classes), -(-items // images)
    generator = torch.Generator().manual_seed(0)
    of_items, of_classes = (torch.randint(2, (count, n), generator=generator) * 2 - 1 for n in (places, classes))
    signs = of_items[:, torch.arange(items) % places, None] * of_classes[:, None]
    # Rank of each class in its item. Classes beyond the last probe belong to it.
    rank = log_p.argsort(dim=1, descending=True, stable=True).argsort(dim=1).clamp_max(count - 1)
    probed = rank == torch.arange(count, device=log_p.device)[:, None, None]
    return probed * signs.to(log_p) * (log_p / 2).exp()
