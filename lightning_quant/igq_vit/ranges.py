"""Ranges fitted to tensors of the calibration images of all ranks."""

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

# Approximate numbers of values per image that errors are compared on, and of rows per image that are clustered.
SEARCHED_VALUES = 2**15
GROUPED_ROWS = 2**10
# Candidate positions of a bound, from the mean of a group's bounds (0) to the outermost one (1).
EXTENSIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SINGLE_EXTENSIONS = (-0.15, -0.05, 0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)


def thinned(x: Tensor, axis: int, images: int, values: int = SEARCHED_VALUES) -> Tensor:
    """Take every n-th slice of an axis, so that about ``values`` numbers per image remain for any split of the images.

    Example:
        >>> thinned(torch.arange(8), 0, images=2, values=2).tolist()
        [0, 2, 4, 6]
    """
    step = min(max(1, x.numel() // images // values), x.shape[axis])
    return x[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]


def tail_bounds(x: Tensor, tails: Sequence[float]) -> Tensor:
    """Find bounds that leave out a share of the values of all ranks at each end, by the nearest-rank method.

    Args:
        x: Tensor of any shape.
        tails: Percentages of the values to leave out at each end, in [0, 50).

    Returns:
        Lower and upper bounds (tails, 2).

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
    """Select the bounds of :func:`tail_bounds` with the smallest quantization error.

    Args:
        x: Tensor of any shape; the error is summed over all ranks.
        bits: Bit-width, 2 to 16.
        tails: Percentages of the values to leave out at each end.
        images: Number of images in ``x``.
        power: Power of the absolute errors: 2 is the mean squared error, 3 penalizes clipping more.

    Returns:
        Lower and upper bound, 0-dim.
    """
    bounds = tail_bounds(x, tails)
    if len(bounds) == 1:
        return bounds[0, 0], bounds[0, 1]
    sample = thinned(x.float(), max(0, x.dim() - 2), images)
    errors = []
    for low, high in bounds:
        quantized = quantize_affine(sample, *affine_parameters(low, high, bits), bits)
        errors.append((quantized - sample).abs_().pow_(power).sum().double())
    best = int(all_reduce_sum(torch.stack(errors)).argmin())
    return bounds[best, 0], bounds[best, 1]


def gram_matrix(x: Tensor) -> Tensor:
    """Sum ``x x^T`` over the inputs of all ranks, (channels, channels), for :func:`weight_range`."""
    flat = x.detach().flatten(0, -2).float()
    return all_reduce_sum(flat.T @ flat)


def weight_range(weight: Tensor, gram: Tensor | None, bits: int, tails: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Select, for each output channel, the percentiles with the smallest mean squared error of the layer's output.

    If ``d`` is the change of a row of the weight and ``G`` the Gram matrix of the inputs, the squared error of the
    outputs is ``d^T G d``. The search therefore needs the inputs only once.

    Args:
        weight: Weight (out, ...).
        gram: Matrix (in, in) of :func:`gram_matrix`; None takes the error of the weight itself.
        bits: Bit-width, 2 to 16.
        tails: Percentages of the values to leave out at each end, interpolated linearly.

    Returns:
        Lower and upper bounds, (out,) each.
    """
    rows = weight.detach().flatten(1).float()
    shares = torch.tensor(tails, dtype=torch.float32, device=rows.device) / 100
    # A single call sorts only once.
    low, high = torch.quantile(rows, torch.cat([shares, 1 - shares]), dim=1).chunk(2)
    errors = []
    for bounds in zip(low, high, strict=True):
        scale, zero_point = affine_parameters(*bounds, bits)
        change = quantize_affine(rows, scale[:, None], zero_point[:, None], bits) - rows
        errors.append(change.square().sum(1) if gram is None else ((change @ gram) * change).sum(1))
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    return low.gather(0, best)[0], high.gather(0, best)[0]


def fit_channel_groups(
    x: Tensor, bits: int, groups: Iterable[int], how: GroupRanges, clip_zero_point: bool = False, *, importance: Tensor
) -> dict[int, GroupQuantizer]:
    """Fit quantizers with channel groups to the calibration images, one for each number of groups.

    Args:
        x: Input (images, tokens, channels) of this rank.
        bits: Bit-width, 2 to 16.
        groups: Numbers of groups.
        how: Range of a group: the "mean" of its channels' bounds (the paper), their "envelope", or one "searched" in
            between.
        clip_zero_point: Whether to clip zero points to the codes, as in the paper.
        importance: Weight of each channel's error in the search, (channels,).

    Returns:
        Quantizers, keyed by number of groups.
    """
    ranges = channel_ranges(x.float())
    points = gather(ranges.flatten(0, 1))
    local = _local_part(ranges.shape[:2].numel())
    fitted = {}
    for count in groups:
        clustering = kmeans(points, count)
        assignment = clustering.assignment[local].view(ranges.shape[:2])
        mean = clustering.centres.float()
        envelope = _envelope(points, clustering.assignment, mean)
        if how == "mean":
            chosen = mean
        elif how == "envelope":
            chosen = envelope
        else:
            chosen = _searched(thinned(x.float(), 1, len(x)), assignment, mean, envelope, bits, importance)
        fitted[count] = GroupQuantizer(bits, count).to(x.device)
        fitted[count].set_ranges(mean, chosen, clip_zero_point)
    return fitted


def _local_part(count: int) -> slice:
    """Locate this rank's points among those of all ranks."""
    if not several_ranks():
        return slice(0, count)
    before = sum(gather(torch.tensor([count])).tolist()[: dist.get_rank()])
    return slice(before, before + count)


def _envelope(points: Tensor, assignment: Tensor, mean: Tensor) -> Tensor:
    """Return the outermost bounds of each group; a group without points, if too few points differ, keeps its mean."""
    low = mean[:, 0].scatter_reduce(0, assignment, points[:, 0].float(), "amin")
    high = mean[:, 1].scatter_reduce(0, assignment, points[:, 1].float(), "amax")
    return torch.stack([low, high], dim=1)


def _searched(x: Tensor, assignment: Tensor, mean: Tensor, envelope: Tensor, bits: int, importance: Tensor) -> Tensor:
    """Search, for each group, the range between mean and envelope with the smallest weighted squared error.

    Both bounds move together first, then the upper and the lower one separately.
    """

    def errors(bounds: Tensor) -> Tensor:
        scale, zero_point = affine_parameters(bounds[:, 0], bounds[:, 1], bits)
        quantized = quantize_affine(x, scale[assignment][:, None], zero_point[assignment][:, None], bits)
        return _sum_by_group((quantized - x).square_().sum(dim=1).double() * importance, assignment, len(mean))

    best = _best([torch.lerp(mean, envelope, share) for share in EXTENSIONS], errors)
    for end in (1, 0):
        options = []
        for share in SINGLE_EXTENSIONS:
            bounds = best.clone()
            bounds[:, end] = torch.lerp(mean[:, end], envelope[:, end], share)
            options.append(bounds)
        best = _best([best, *options], errors)
    return best


def _best(candidates: list[Tensor], errors: Callable[[Tensor], Tensor]) -> Tensor:
    """Select, for each group, the candidate with the smallest error over all ranks; the first one wins ties."""
    least = all_reduce_sum(torch.stack([errors(bounds) for bounds in candidates])).argmin(dim=0)
    return torch.stack(candidates)[least, torch.arange(len(least), device=least.device)]


def _sum_by_group(values: Tensor, assignment: Tensor, groups: int) -> Tensor:
    sums = torch.zeros(groups, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, assignment.flatten(), values.flatten())


def fit_row_groups(
    attention: Tensor, bits: int, groups: Iterable[int], how: GroupRanges, images: int
) -> dict[int, RowGroupQuantizer]:
    """Fit quantizers with groups of softmax rows to the calibration images, one for each number of groups.

    Args:
        attention: Softmax (..., rows, keys) of this rank.
        bits: Bit-width, 2 to 16.
        groups: Numbers of groups.
        how: Upper bound of a group: the "mean" of its rows' maxima (the paper), their "envelope", or one "searched" in
            between.
        images: Number of images in ``attention``.

    Returns:
        Quantizers, keyed by number of groups.
    """
    attention = thinned(attention.float(), -2, images, GROUPED_ROWS * attention.shape[-1])
    maxima = row_maxima(attention)
    points = gather(maxima.flatten()[:, None])
    local = _local_part(maxima.numel())
    fitted = {}
    for count in groups:
        clustering = kmeans(points, count)
        mean = clustering.centres[:, 0].float()
        # A group without rows keeps its mean.
        widest = mean.scatter_reduce(0, clustering.assignment, points[:, 0], "amax")
        chosen = {"mean": mean, "envelope": widest}.get(how)
        if chosen is None:
            chosen = _searched_rows(attention, clustering.assignment[local].view(maxima.shape), mean, widest, bits)
        fitted[count] = RowGroupQuantizer(bits, count).to(attention.device)
        fitted[count].set_ranges(mean, chosen)
    return fitted


def _searched_rows(attention: Tensor, assignment: Tensor, mean: Tensor, widest: Tensor, bits: int) -> Tensor:
    def errors(high: Tensor) -> Tensor:
        scale, _ = affine_parameters(torch.zeros_like(high), high, bits)
        quantized = quantize_affine(attention, scale[assignment], None, bits)
        return _sum_by_group((quantized - attention).square_().sum(dim=-1).double(), assignment, len(mean))

    return _best([torch.lerp(mean, widest, share) for share in EXTENSIONS], errors)
