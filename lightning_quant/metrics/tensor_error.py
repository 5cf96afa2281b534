"""Statistics of the quantization of a tensor: signal to noise, clipping, used codes, and differences of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.functional.grid import encode
from lightning_quant.quantizers import Quantizer

# Largest bit-width for which the used codes are counted.
_COUNTED_BITS = 8
_VALUES_PER_CODE = 8


@dataclass(frozen=True)
class TensorFigures:
    """Statistics of a tensor over all recorded calls.

    Attributes:
        bits: Bit-width of the codes.
        low: Smallest value.
        high: Largest value.
        sqnr: Signal-to-quantization-noise ratio, ``10 log10(sum x^2 / sum (x - q(x))^2)`` in dB; inf without noise.
        clipped: Fraction of the values that lie outside the grid by more than rounding; None for non-uniform steps.
        codes_used: Fraction of the codes that occur, averaged over channels with their own grid; None for non-uniform
            steps, for more than 256 codes, and for more codes than an eighth of the values.
        negative: Fraction of the values that are negative.
        signed: Whether some codes represent negative values; None if unknown.
        channel_ratio: Range of the widest channel divided by the median range; None for a single channel.
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
    """Accumulator of the quantization error of a tensor over several calls.

    Args:
        quantizer: Quantizer of the tensor.
        channel_axis: Channel axis of the tensor.
        own_codes: Whether each channel has its own grid, like the output channels of weights.

    Example:
        >>> from lightning_quant.quantizers import LearnedQuantizer
        >>> quantizer = LearnedQuantizer(2, signed=False)
        >>> quantizer.initialize(torch.tensor([0.0, 1.0]))
        >>> _ = quantizer.range.data.fill_(3.0)
        >>> error = TensorError(quantizer, channel_axis=1)
        >>> error.update(torch.tensor([[0.0, 1.0], [0.0, 9.0]]).repeat(8, 1))
        >>> figures = error.figures()
        >>> figures.clipped, figures.codes_used, round(figures.sqnr, 2)
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
        """Add the tensor of one call, of any shape with the channel axis. Empty tensors are ignored."""
        if x.numel() == 0:
            return
        values = x.detach().float()
        # Learned rounding is specific to its weight, so the quantizer gets the original tensor rather than a copy.
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
        # With few values, many codes are unused by chance.
        if self.used is None or self.count < _VALUES_PER_CODE * self.used.numel():
            return None
        return float(self.used.float().mean())

    def figures(self) -> TensorFigures | None:
        """Compute the statistics so far, or None if there was no tensor."""
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
