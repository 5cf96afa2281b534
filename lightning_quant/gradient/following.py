"""Ranges that keep up with a tensor that outgrows them.

Adam moves a range by at most its learning rate a step. A layer that starts at zero takes its range from the first
values that are not zero, and grows by orders of magnitude: its weights would stop at the range, where the clamp passes
no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_quant.quantizers import LearnedQuantizer

# A range that started at three standard deviations clips 0.3 %, and learned ranges of 2 bits 22 % of normal values.
CLIPPED = 1 / 3
# Half of what a range starts with.
BEHIND = 3 / 2
# Values, squares, and how many are not 0, clipped, and of a code that is not 0.
ROWS = 5


def usual_size(layer: nn.Module, kind: str) -> float:
    """Return the root mean square of a tensor of a layer with PyTorch's initialization in a normalized network.

    Example:
        >>> usual_size(nn.Linear(12, 4), "weight_quantizer"), usual_size(nn.Linear(12, 4), "input_quantizer")
        (0.16666666666666666, 1.0)
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    fan_in = weight.shape[1:].numel()
    return float((3 * max(fan_in, 1)) ** -0.5) if kind == "weight_quantizer" else 1.0


def own_sums(quantizers: Sequence[LearnedQuantizer]) -> Tensor:
    """Sum over the samples of this rank: (ROWS, quantizers) FP64, zeros for quantizers without a sample."""
    if not quantizers:
        return torch.zeros(ROWS, 0, dtype=torch.float64)
    ranges = torch.stack([q.range.detach().abs() for q in quantizers])
    samples = [ranges[:0] if q.sample is None else q.sample for q in quantizers]
    count = torch.tensor([len(sample) for sample in samples]).to(ranges.device, non_blocking=True)
    codes = torch.tensor([q.grid.high for q in quantizers]).to(ranges.device, non_blocking=True)
    # Padding with 0 adds to no sum.
    magnitude = pad_sequence(samples, batch_first=True).abs()
    rows = (
        count,
        magnitude.double().square().sum(1),
        (magnitude > 0).sum(1),
        (magnitude > ranges[:, None]).sum(1),
        (magnitude > (ranges / (2 * codes))[:, None]).sum(1),
    )
    return torch.stack([row.double() for row in rows])


def factors(sums: Tensor, ranges: Tensor, usual: Tensor) -> Tensor:
    """Return the factor of each range: 2 where its tensor has outgrown it, 1/2 where all codes are 0, else 1.

    A tensor has outgrown its range where more than a third of what is not 0 is clipped, and the range is less than
    half of the three root mean squares that it would start with. It is followed up to the usual size: beyond it a
    range learns as published, and bounds the weights of a training that diverges.

    Args:
        sums: Sums of :func:`own_sums` over all ranks, (ROWS, ranges).
        ranges: Learned ranges, (ranges,).
        usual: Sizes of :func:`usual_size`, (ranges,).

    Example:
        >>> sums = torch.tensor([[10.0, 10.0], [10.0, 0.1], [10.0, 10.0], [4.0, 0.0], [10.0, 0.0]])
        >>> factors(sums, torch.ones(2), torch.ones(2)).tolist()
        [2.0, 0.5]
    """
    count, squares, nonzero, clipped, coded = sums
    size = (squares / count.clamp_min(1)).sqrt()
    small = ranges.abs() < BEHIND * torch.minimum(size, usual)
    outgrown = (clipped > CLIPPED * nonzero) & small & size.isfinite()
    empty = (nonzero > 0) & (coded == 0)
    return torch.where(outgrown, 2.0, torch.where(empty, 0.5, 1.0))
