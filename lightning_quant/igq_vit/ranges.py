"""Ranges fitted to the tensors of the calibration images, over the images of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_quant.functional.groups import affine_parameters, channel_ranges, quantize_affine, row_maxima
from lightning_quant.igq_vit.clustering import kmeans
from lightning_quant.igq_vit.settings import GroupRanges
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer
from lightning_quant.utilities.distributed import all_reduce_sum, gather, several_ranks

# Errors are compared on about so many values of an image, and rows grouped by about so many.
SEARCHED_VALUES = 2**15
GROUPED_ROWS = 2**10
# Shares of the way from the mean of a group's bounds to the outermost one.
EXTENSIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SINGLE_EXTENSIONS = (-0.15, -0.05, 0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)


def thinned(x: Tensor, axis: int, images: int, values: int = SEARCHED_VALUES) -> Tensor:
    """Every n-th slice of an axis, so that about ``values`` numbers an image are left, however the images are split.

    Example:
        >>> thinned(torch.arange(8), 0, images=2, values=2).tolist()
        [0, 2, 4, 6]
    """
    step = min(max(1, x.numel() // images // values), x.shape[axis])
    return x[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]


def tail_bounds(x: Tensor, tails: Sequence[float]) -> Tensor:
    """Bounds that leave a share of the values of all ranks out at each end, by nearest rank.

    Args:
        x: any shape.
        tails: per cent at each end, in [0, 50).

    Returns:
        (tails, 2).

    Example:
        >>> tail_bounds(torch.arange(101.0), [0.0, 5.0]).tolist()
        [[0.0, 100.0], [5.0, 95.0]]
    """
    flat = x.detach().float().flatten()
    count = int(all_reduce_sum(torch.tensor([flat.numel()], device=flat.device)))
    cuts = [int(count * tail / 100) for tail in tails]
    deepest = min(max(cuts) + 1, flat.numel())
    ends = []
    for largest in (False, True):
        extremes = gather(flat.topk(deepest, largest=largest).values).sort(descending=largest).values
        ends.append(extremes[cuts])
    return torch.stack(ends, dim=1)


def layer_wise_range(
    x: Tensor, bits: int, tails: Sequence[float], images: int = 1, power: int = 2
) -> tuple[Tensor, Tensor]:
    """The bounds among those of :func:`tail_bounds` whose quantization error has the least mean square.

    Args:
        x: any shape; the union over ranks counts.
        bits: 2..16.
        tails: per cent at each end.
        images: how many ``x`` holds.
        power: 2 for the square of the errors, 3 for their cube, which tells more against clipping.

    Returns:
        lower and upper bound, 0-dim.
    """
    bounds = tail_bounds(x, tails)
    if len(bounds) == 1:
        return bounds[0, 0], bounds[0, 1]
    few = thinned(x.float(), max(0, x.dim() - 2), images)
    errors = []
    for low, high in bounds:
        moved = quantize_affine(few, *affine_parameters(low, high, bits), bits)
        errors.append((moved - few).abs_().pow_(power).sum().double())
    best = int(all_reduce_sum(torch.stack(errors)).argmin())
    return bounds[best, 0], bounds[best, 1]


def gram_matrix(x: Tensor) -> Tensor:
    """Sum over all inputs of all ranks of ``x x^T``, (channels, channels), for :func:`weight_range`."""
    flat = x.detach().flatten(0, -2).float()
    return all_reduce_sum(flat.T @ flat)


def weight_range(weight: Tensor, gram: Tensor | None, bits: int, tails: Sequence[float]) -> tuple[Tensor, Tensor]:
    """For each output channel, the percentiles that give the layer's output the least mean square error.

    With ``d`` the change of a row of the weight, the error of its outputs is ``d^T G d``, G the Gram matrix of the
    inputs: the search needs the inputs once.

    Args:
        weight: (out, ...).
        gram: (in, in) of :func:`gram_matrix`; None takes the error of the weight itself.
        bits: 2..16.
        tails: per cent at each end, interpolated linearly.

    Returns:
        lower and upper bounds, (out,) each.
    """
    rows = weight.detach().flatten(1).float()
    shares = torch.tensor(tails, dtype=torch.float32, device=rows.device) / 100
    # One call, which sorts once.
    low, high = torch.quantile(rows, torch.cat([shares, 1 - shares]), dim=1).chunk(2)
    errors = []
    for bounds in zip(low, high, strict=True):
        scale, zero_point = affine_parameters(*bounds, bits)
        moved = quantize_affine(rows, scale[:, None], zero_point[:, None], bits) - rows
        errors.append(moved.square().sum(1) if gram is None else ((moved @ gram) * moved).sum(1))
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    return low.gather(0, best)[0], high.gather(0, best)[0]


def fit_channel_groups(
    x: Tensor, bits: int, groups: Iterable[int], how: GroupRanges, clip_zero_point: bool = False, *, importance: Tensor
) -> dict[int, GroupQuantizer]:
    """Quantizers of the channels of the calibration images, one for each number of groups asked for.

    Args:
        x: (images, tokens, channels) of this rank.
        bits: 2..16.
        groups: numbers of groups.
        how: range of a group: "mean" of its channels' bounds (the paper), their "envelope", or "searched" in between.
        clip_zero_point: the zero point as the paper writes it.
        importance: (channels,) weight of a channel's error in the search.
    """
    ranges = channel_ranges(x.float())
    points = gather(ranges.flatten(0, 1))
    own = _own_part(ranges.shape[:2].numel())
    fitted = {}
    for count in groups:
        found = kmeans(points, count)
        assignment = found.assignment[own].view(ranges.shape[:2])
        mean = found.centres.float()
        envelope = _envelope(points, found.assignment, mean)
        if how == "mean":
            chosen = mean
        elif how == "envelope":
            chosen = envelope
        else:
            chosen = _searched(thinned(x.float(), 1, len(x)), assignment, mean, envelope, bits, importance)
        fitted[count] = GroupQuantizer(bits, count).to(x.device)
        fitted[count].set_ranges(mean, chosen, clip_zero_point)
    return fitted


def _own_part(count: int) -> slice:
    """Where this rank's points lie among those of all ranks."""
    if not several_ranks():
        return slice(0, count)
    before = sum(gather(torch.tensor([count])).tolist()[: dist.get_rank()])
    return slice(before, before + count)


def _envelope(points: Tensor, assignment: Tensor, mean: Tensor) -> Tensor:
    """Outermost bounds of each group; of one without points, as where fewer points differ than groups, its mean."""
    low = mean[:, 0].scatter_reduce(0, assignment, points[:, 0].float(), "amin")
    high = mean[:, 1].scatter_reduce(0, assignment, points[:, 1].float(), "amax")
    return torch.stack([low, high], dim=1)


def _searched(x: Tensor, assignment: Tensor, mean: Tensor, envelope: Tensor, bits: int, importance: Tensor) -> Tensor:
    """Per group, the range around the mean with the least weighted square error of the values.

    First both ends together on the way to the envelope, then the upper and the lower one each for itself.
    """

    def errors(bounds: Tensor) -> Tensor:
        scale, zero_point = affine_parameters(bounds[:, 0], bounds[:, 1], bits)
        moved = quantize_affine(x, scale[assignment][:, None], zero_point[assignment][:, None], bits)
        return _sum_by_group((moved - x).square_().sum(dim=1).double() * importance, assignment, len(mean))

    best = _best([torch.lerp(mean, envelope, share) for share in EXTENSIONS], errors)
    for end in (1, 0):
        moved = []
        for share in SINGLE_EXTENSIONS:
            bounds = best.clone()
            bounds[:, end] = torch.lerp(mean[:, end], envelope[:, end], share)
            moved.append(bounds)
        best = _best([best, *moved], errors)
    return best


def _best(candidates: list[Tensor], errors: Callable[[Tensor], Tensor]) -> Tensor:
    """For each group the candidate with the least error over all ranks, the first of equal ones."""
    least = all_reduce_sum(torch.stack([errors(bounds) for bounds in candidates])).argmin(dim=0)
    return torch.stack(candidates)[least, torch.arange(len(least), device=least.device)]


def _sum_by_group(values: Tensor, assignment: Tensor, groups: int) -> Tensor:
    sums = torch.zeros(groups, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, assignment.flatten(), values.flatten())


def fit_row_groups(
    attention: Tensor, bits: int, groups: Iterable[int], how: GroupRanges, images: int
) -> dict[int, RowGroupQuantizer]:
    """Quantizers of the rows of the softmax of the calibration images, one for each number of groups asked for.

    Args:
        attention: (..., rows, keys) of this rank.
        bits: 2..16.
        groups: numbers of groups.
        how: upper bound of a group: "mean" of its rows' maxima (the paper), their "envelope", or "searched".
        images: how many of them ``attention`` is of.
    """
    attention = thinned(attention.float(), -2, images, GROUPED_ROWS * attention.shape[-1])
    own = row_maxima(attention)
    points = gather(own.flatten()[:, None])
    part = _own_part(own.numel())
    fitted = {}
    for count in groups:
        found = kmeans(points, count)
        mean = found.centres[:, 0].float()
        # From the mean, which a group without rows keeps.
        widest = mean.scatter_reduce(0, found.assignment, points[:, 0], "amax")
        chosen = {"mean": mean, "envelope": widest}.get(how)
        if chosen is None:
            chosen = _searched_rows(attention, found.assignment[part].view(own.shape), mean, widest, bits)
        fitted[count] = RowGroupQuantizer(bits, count).to(attention.device)
        fitted[count].set_ranges(mean, chosen)
    return fitted


def _searched_rows(attention: Tensor, assignment: Tensor, mean: Tensor, widest: Tensor, bits: int) -> Tensor:
    def errors(high: Tensor) -> Tensor:
        scale, _ = affine_parameters(torch.zeros_like(high), high, bits)
        moved = quantize_affine(attention, scale[assignment], None, bits)
        return _sum_by_group((moved - attention).square_().sum(dim=-1).double(), assignment, len(mean))

    return _best([torch.lerp(mean, widest, share) for share in EXTENSIONS], errors)
