"""How much the posteriors move when one activation is quantized, for all layers at once: to second order.

A small change d of an activation moves the posteriors p by KL = 1/2 sum_c p_c (d . grad log p_c)^2. The gradients do
not depend on d: one forward and a few backward passes serve all layers and all numbers of groups.
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

# Backward passes. One for each of the likeliest classes of an image, the last for all other classes together.
PROBES = 8
# Activations and gradients are held for so many images at a time as have about this many values, 0.5 GB.
HELD_VALUES = 2**27


class Tap(InstanceQuantizer):
    """The identity in a slot, which remembers the tensor, as one that has a gradient.

    Attributes:
        seen: of the last forward.
    """

    seen: Tensor

    def __init__(self) -> None:
        super().__init__(bits=16)
        self.ready = True

    def forward(self, x: Tensor) -> Tensor:
        """A view, whose gradient is of this slot alone where several layers have the same input."""
        x = x if x.requires_grad else x.detach().requires_grad_()
        self.seen = x.view_as(x)
        return self.seen


def estimated_perturbations(
    network: nn.Module,
    run: Callable[[Tensor], Any],
    images: Tensor,
    candidates: Mapping[Slot, Candidates],
    posteriors: Callable[[Any], Tensor],
) -> dict[Slot, dict[int, float]]:
    """Estimate Omega of all layers, by number of groups.

    Args:
        network: Network in float, all slots empty.
        run: Forward of the network, which lets gradients through.
        images: Calibration images of this rank (n, C, H, W).
        candidates: Quantizers by number of groups, of each slot.
        posteriors: Function from outputs to log-probabilities (items, classes).

    Returns:
        Mean divergences over the items of all ranks; nothing where the log-probabilities have no gradient.
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
                torch.stack([square for each in _squares(log_p, len(part), taps, candidates) for square in each]) / 2
            )
            values = sum(tap.seen.numel() for tap in taps.values()) // len(part)
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
    """Of each slot, by candidate: the sum over probes and images of the squared change of the probed sums."""
    probes = _probes(log_p.detach(), images)
    seen = [tap.seen for tap in taps.values()]
    passes = [torch.autograd.grad(log_p, seen, probe, retain_graph=True, materialize_grads=True) for probe in probes]
    for (slot, tap), gradients in zip(taps.items(), zip(*passes, strict=True), strict=True):
        gradient = torch.stack([each.float().reshape(images, -1) for each in gradients])
        yield [
            torch.einsum("pin,in->pi", gradient, _change(quantizer, tap, images)).double().square().sum()
            for quantizer in candidates[slot].values()
        ]


def _change(quantizer: Quantizer, tap: Tap, images: int) -> Tensor:
    """By which a quantizer moves the tensor that a tap has seen, (images, values)."""
    x = tap.seen.detach()
    if isinstance(quantizer, InstanceQuantizer):
        quantizer.instances = tap.instances
    try:
        change: Tensor = quantizer(x).float() - x.float()
        return change.reshape(images, -1)
    finally:
        if isinstance(quantizer, InstanceQuantizer):
            quantizer.instances = None


def _probes(log_p: Tensor, images: int) -> Tensor:
    """Weights z (probes, items, classes) with sum z z^T = diag(p) of each item: its likeliest classes, then the others.

    Signs keep the others apart, and the items of an image, in the mean. They are the same for each image, so that
    nothing depends on how images are divided.
    """
    items, classes = log_p.shape
    count, places = min(PROBES, classes), -(-items // images)
    generator = torch.Generator().manual_seed(0)
    of_items, of_classes = (torch.randint(2, (count, n), generator=generator) * 2 - 1 for n in (places, classes))
    signs = of_items[:, torch.arange(items) % places, None] * of_classes[:, None]
    # The rank of each class in its item; all beyond the last probe are in it.
    rank = log_p.argsort(dim=1, descending=True, stable=True).argsort(dim=1).clamp_max(count - 1)
    probed = rank == torch.arange(count, device=log_p.device)[:, None, None]
    return probed * signs.to(log_p) * (log_p / 2).exp()
