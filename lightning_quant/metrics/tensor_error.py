"""What quantization does to one tensor: signal to noise, clipping, codes that are used, and how channels differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.functional.grid import encode
from lightning_quant.quantizers import Quantizer

# More codes than this are not counted one by one.
_COUNTED_BITS = 8
_VALUES_PER_CODE = 8


@dataclass(frozen=True)
class TensorFigures:
    """Figures of one tensor over all calls that were seen.

    Attributes:
        bits: of its codes.
        low: smallest value.
        high: largest value.
        sqnr: signal to quantization noise, ``10 log10(sum x^2 / sum (x - q(x))^2)`` in dB; inf without any noise.
        clipped: share of the values that lie outside the codes by more than rounding; None where the steps are not
            uniform.
        codes_used: share of the codes that occur, mean over the channels that have codes of their own; None where
            they are not uniform, more than 256, or more than an eighth of the values.
        negative: share of the values below 0.
        signed: whether codes stand for values below 0; None where that is not known.
        channel_ratio: range of the widest channel over that of the median one; None for one channel.
    """

    bits: int
    low: float
    high: float
    sqnr: float
    clipped: float | None
    codes_used: float | None
    negative: float
    signed: bool | None
    channel_ratio: float | None


class TensorError:
    """Adds up what a quantizer does to a tensor, call by call.

    Args:
        quantizer: that acts on the tensor.
        channel_axis: of the tensor.
        own_codes: whether each channel has a grid of its own, as the output channels of weights.

    Example:
        >>> from lightning_quant.quantizers import LearnedQuantizer
        >>> quantizer = LearnedQuantizer(2, signed=False)
        >>> quantizer.initialize(torch.tensor([0.0, 1.0]))
        >>> _ = quantizer.range.data.fill_(3.0)
        >>> error = TensorError(quantizer, channel_axis=1)
        >>> error.update(torch.tensor([[0.0, 1.0], [0.0, 9.0]]).repeat(8, 1))
        >>> found = error.figures()
        >>> found.clipped, found.codes_used, round(found.sqnr, 2)
        (0.25, 0.75, 3.58)
    """

    def __init__(self, quantizer: Quantizer, channel_axis: int, own_codes: bool = False) -> None:
        self.quantizer, self.channel_axis, self.own_codes = quantizer, channel_axis, own_codes
        self.count = self.negative = self.clipped = 0
        self.signal = self.noise = 0.0
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.used: Tensor | None = None
        self.uniform = self.signed = False

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in one call's tensor, of any shape with that channel axis; nothing where it is empty."""
        if x.numel() == 0:
            return
        values = x.detach().float()
        # A rounding that was learned is not that of another tensor, so the quantizer sees the one that it was given.
        noise = self.quantizer(x.detach()).float() - values
        self.count += values.numel()
        self.negative += int((values < 0).sum())
        self.signal += float(values.double().square().sum())
        self.noise += float(noise.double().square().sum())
        by_channel = values.movedim(self.channel_axis, 0).flatten(1) if values.dim() > 1 else values.view(1, -1)
        low, high = by_channel.amin(1), by_channel.amax(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self._count_codes(x.detach())

    def _count_codes(self, x: Tensor) -> None:
        affine, grid = self.quantizer.affine_of(x), self.quantizer.grid
        self.uniform = affine is not None
        if affine is None:
            return
        scale, zero_point = affine
        position = x.float() / scale + (0 if zero_point is None else zero_point)
        self.clipped += int(((position < grid.low - 0.5) | (position > grid.high + 0.5)).sum())
        self.signed = self.signed or grid.low < 0 or bool(zero_point is not None and (zero_point > grid.low).any())
        if self.quantizer.bits > _COUNTED_BITS:
            return
        codes = (encode(x, scale, grid, zero_point) - grid.low).long()
        rows = codes.movedim(self.channel_axis, 0).flatten(1) if self.own_codes else codes.reshape(1, -1)
        used = torch.zeros(len(rows), grid.high - grid.low + 1, dtype=torch.bool, device=x.device)
        used.scatter_(1, rows, value=True)
        self.used = used if self.used is None else self.used | used

    def _share_of_codes(self) -> float | None:
        # Of a few values many codes are unused, which says nothing.
        if self.used is None or self.count < _VALUES_PER_CODE * self.used.numel():
            return None
        return float(self.used.float().mean())

    def figures(self) -> TensorFigures | None:
        """What was seen so far; None where nothing was."""
        if self.low is None or self.high is None:
            return None
        widths = self.high - self.low
        median = float(widths.median())
        sqnr = 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf
        return TensorFigures(
            bits=self.quantizer.bits,
            low=float(self.low.min()),
            high=float(self.high.max()),
            sqnr=sqnr,
            clipped=self.clipped / self.count if self.uniform else None,
            codes_used=self._share_of_codes(),
            negative=self.negative / self.count,
            signed=self.signed if self.uniform else None,
            channel_ratio=float(widths.max()) / median if len(widths) > 1 and median > 0 else None,
        )
