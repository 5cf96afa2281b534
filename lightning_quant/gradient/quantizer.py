"""The quantizer of a layer's output gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.errors import QuantizationError
from lightning_quant.functional.blocks import blocks, dense, in_memory
from lightning_quant.functional.grid import Grid, encode, symmetric_grid
from lightning_quant.gradient.interval import IntervalStrategy, LargeGradientInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.nn.operands import Codes
from lightning_quant.quantizers import Quantizer

LARGE_SHARE = 1e-3
_FP32 = torch.finfo(torch.float32)


class GradientErrors(NamedTuple):
    """Errors of one quantized gradient: means of abs(G - G^) / max(abs(G)), and shares.

    Attributes:
        all: Mean error of all gradients.
        large: Mean error of the top share alpha of abs(G).
        clipped: Share of abs(G) > gamma * g_max.
        zero: Share of codes that are 0.
    """

    all: Tensor
    large: Tensor
    clipped: Tensor
    zero: Tensor


def gradient_errors(gradient: Tensor, codes: Tensor, step: Tensor, gamma: Tensor, alpha: float) -> GradientErrors:
    """Compute the errors of a quantized gradient, each 0-dim.

    Args:
        gradient: Gradient G, FP32, any shape.
        codes: Codes of its shape.
        step: Step size of the codes, 0-dim.
        gamma: Share of the largest gradient that the interval spans, 0-dim.
        alpha: Share of the gradients that count as large.

    Example:
        >>> g = torch.tensor([0.0, 0.5, 2.0])
        >>> errors = gradient_errors(g, torch.tensor([0.0, 1.0, 1.0]), torch.tensor(1.0), torch.tensor(0.5), 0.3)
        >>> [round(float(e), 2) for e in errors]
        [0.25, 0.5, 0.33, 0.33]
    """
    magnitude = gradient.abs().flatten()
    large = magnitude.topk(max(1, int(alpha * magnitude.numel())))
    error = (gradient - codes * step).abs().flatten() / large.values[0]
    return GradientErrors(
        all=error.mean(),
        large=error[large.indices].mean(),
        clipped=(magnitude > gamma * large.values[0]).float().mean(),
        zero=(codes == 0).float().mean(),
    )


@dataclass
class TrainingRun:
    """What a training gives to a quantizer of gradients, and what it takes from it when an optimizer steps.

    Attributes:
        noise: Source of the rounding noise; None outside of a training.
        clipped: Number of gradients beyond the interval since the last optimizer step; None before the first.
        total: Number of gradients since the last optimizer step; None before the first.
        restarts: Whether gamma starts anew with the next gradient.
        agreed: Whether gamma has been made equal over the ranks since it started.
        observes: Whether the errors of the next gradient are measured.
        errors: Errors of the gradient that was observed; None where none was.
    """

    noise: NoiseSource | None = None
    clipped: Tensor | None = None
    total: Tensor | None = None
    restarts: bool = False
    agreed: bool = False
    observes: bool = False
    errors: GradientErrors | None = None

    def count(self, clipped: Tensor, total: Tensor) -> None:
        """Add the counts of a gradient, 0-dim each."""
        self.clipped = clipped if self.clipped is None else self.clipped + clipped
        self.total = total if self.total is None else self.total + total

    def reset_counts(self) -> None:
        """Begin to count anew, after an optimizer step."""
        self.clipped = self.total = None

    def take_errors(self) -> GradientErrors | None:
        """Return the errors that were observed, and forget them."""
        errors, self.errors = self.errors, None
        return errors


class GradientQuantizer(Quantizer, kind=3):
    """Stochastic rounding of a gradient to b bits within [-gamma * g_max, gamma * g_max].

    ``c = gamma * max(abs(G)); d = 2c / (2^b - 2); codes = clamp(round(G / d + U(-1/2, 1/2)))``, per tensor
    (arXiv 2407.12637, eq. 3). A gradient that is not finite, or all zero, passes through and counts for nothing.

    Args:
        bits: Bit-width, 2 to 16.
        interval: Strategy by which gamma starts and moves.

    Attributes:
        run: State of the training that the quantizer takes part in.

    Example:
        >>> from lightning_quant.gradient import MinMaxInterval
        >>> quantizer = GradientQuantizer(4, MinMaxInterval())
        >>> quantizer.run.noise = NoiseSource(seed=0)
        >>> quantizer.quantize(torch.tensor([1.0, -7.0, 7.0])).values.tolist()
        [1.0, -7.0, 7.0]
    """

    gamma: Tensor
    scalar_state = True

    def __init__(self, bits: int, interval: IntervalStrategy) -> None:
        super().__init__(bits)
        self.interval = interval
        self.run = TrainingRun()
        self.register_buffer("gamma", torch.tensor(float("nan")))

    @classmethod
    def from_signature(cls, signature: list[int]) -> GradientQuantizer:
        """Build a quantizer with the default strategy; a training gives it its own."""
        return cls(signature[0], LargeGradientInterval())

    @property
    def grid(self) -> Grid:
        """-(2^(b-1)-1) .. 2^(b-1)-1."""
        return symmetric_grid(self.bits)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start gamma from abs(G) in ``x``, unless the gradient is not finite or all zero."""
        largest = float(x.max())
        if 0 < largest < float("inf"):
            self.gamma.copy_(self.interval.start(x, self.bits))
            self.ready, self.run.agreed = True, False

    def _restart(self, magnitude: Tensor) -> None:
        """Start gamma anew where the gradient is finite and not all zero, without asking the host."""
        largest = magnitude.max()
        started = self.interval.start(torch.where(largest.isfinite(), magnitude, 1.0), self.bits)
        self.gamma.copy_(torch.where(largest.isfinite() & (largest > 0), started, self.gamma))
        self.run.restarts = self.run.agreed = False

    @torch.no_grad()
    def quantize(self, gradient: Tensor) -> Codes:
        """Quantize a gradient of any shape to codes and their step size. The gradient is not written to.

        Raises:
            QuantizationError: A network that is trained without the callback.
        """
        run, grid = self.run, self.grid
        if run.noise is None:
            raise QuantizationError(
                "A network with quantized gradients trains, and nothing moves its intervals: add"
                " lightning_quant.GradientQuantization(...) to the Trainer's callbacks, or call"
                " lightning_quant.strip(module) to train it in float."
            )
        values = dense(gradient)
        if not values.numel():
            return Codes(values.float())
        if not self.ready:
            self.initialize(values.float().abs())
        elif run.restarts:
            self._restart(values.float().abs())
        low, high = in_memory(values).aminmax()
        threshold = self.gamma * torch.maximum(-low, high).float()
        # Neither NaN nor infinite, and no step below the smallest normal number, which would divide by zero.
        usable = (threshold >= grid.high * _FP32.tiny) & (threshold <= _FP32.max)
        step = torch.where(usable, threshold / grid.high, 1.0)
        codes = torch.empty_like(values, dtype=torch.float32)
        noise = run.noise.draw(values.numel(), values.device).as_strided(values.shape, values.stride())
        clipped: Tensor | None = None
        keep = -usable.to(torch.int32)
        for v, c, u in blocks(values, codes, noise):
            v = v.float()
            if self.interval.counts:
                beyond = v.abs().gt_(threshold).sum()
                clipped = beyond if clipped is None else clipped + beyond
            encode(v, step, grid, noise=u, out=c)
            # c where usable, else v: by bits, since torch.where takes twice as long.
            bits, original = c.view(torch.int32), v.view(torch.int32)
            bits.bitwise_xor_(original).bitwise_and_(keep).bitwise_xor_(original)
        if clipped is not None:
            run.count(clipped * usable, usable * float(values.numel()))
        if run.observes:
            alpha = getattr(self.interval, "alpha", LARGE_SHARE)
            run.errors = gradient_errors(values.float(), codes, step, self.gamma, alpha)
            run.observes = False
        return Codes(codes, step, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized gradient ``codes * step``, of the shape and dtype of ``x``."""
        codes = self.quantize(x)
        assert codes.scale is not None
        return (codes.values * codes.scale).to(x.dtype)
