"""Strategies for the interval of the gradient quantizer: which share gamma of the largest gradient it spans.

The interval is [-gamma * g_max, gamma * g_max] with g_max = max(abs(G)). Source of the rules: Kim et al., "Toward INT4
Fixed-Point Training via Exploring Quantization Error for Gradients", ECCV 2024, sections 3 and 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError

MIN_GAMMA = 0.001


class IntervalStrategy(ABC):
    """Base class of the rules by which gamma starts and moves. Instances hold settings, never state.

    Attributes:
        counts: Whether the strategy has a :meth:`step`, which needs the share of clipped gradients: a pass over them.
        every: Number of optimizer steps between two calls of :meth:`start`; None calls it once.
    """

    counts: bool = False
    every: int | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.counts = cls.step is not IntervalStrategy.step

    @abstractmethod
    def start(self, magnitude: Tensor, bits: int) -> Tensor:
        """Choose the first gamma, before the gradient G is quantized.

        Args:
            magnitude: Magnitudes abs(G), FP32, any shape, finite, not all zero.
            bits: Bit-width of the gradient.

        Returns:
            Gamma in (0, 1], 0-dim.
        """

    def step(self, gamma: Tensor, clipped: Tensor, target: Tensor) -> Tensor:
        """Return the gammas after an optimizer step.

        Args:
            gamma: Gammas before, (layers,).
            clipped: Shares R of abs(G) > gamma * g_max over the step, (layers,).
            target: Shares of :meth:`target`, (layers,).
        """
        return gamma

    def target(self, bits: int) -> float:
        """Return the share of clipped gradients that the strategy aims at; NaN where it has none."""
        return float("nan")


class LargeGradientInterval(IntervalStrategy):
    """Keep the error of the large gradients small: the paper's method.

    Large is the top share alpha of abs(G). The bound on their mean error has its minimum where the clipped share R is
    alpha / (2^b - 1), so that gamma moves by ``step`` against the sign of the difference at each optimizer step.
    It starts at the exact quantile.

    Args:
        alpha: Share of the gradients that count as large, in (0, 1].
        step: Distance by which gamma moves in an optimizer step (beta in the paper), in (0, 1).

    Raises:
        ConfigurationError: A value out of its range.

    Example:
        >>> strategy = LargeGradientInterval()
        >>> round(strategy.target(4) * 15, 6)
        0.001
    """

    def __init__(self, alpha: float = 1e-3, step: float = 1e-3) -> None:
        if not 0 < alpha <= 1:
            raise ConfigurationError(
                f"alpha={alpha}: the share of large gradients lies in (0, 1], for example alpha=1e-3."
            )
        if not 0 < step < 1:
            raise ConfigurationError(f"step={step}: gamma lies in (0, 1] and moves by less, for example step=1e-3.")
        self.alpha = alpha
        self.beta = step

    def target(self, bits: int) -> float:
        """Return ``alpha / (2^bits - 1)``."""
        levels: int = 2**bits - 1
        return self.alpha / levels

    def start(self, magnitude: Tensor, bits: int) -> Tensor:
        """Choose the quantile that leaves the target share strictly above it."""
        above = int(self.target(bits) * magnitude.numel())
        largest = magnitude.flatten().topk(above + 1).values
        return (largest[-1] / largest[0]).clamp(MIN_GAMMA, 1)

    def step(self, gamma: Tensor, clipped: Tensor, target: Tensor) -> Tensor:
        """Return ``gamma + step * sign(clipped - target)``, clamped to [0.001, 1]."""
        return (gamma + self.beta * torch.sign(clipped - target)).clamp(MIN_GAMMA, 1)


class FixedInterval(IntervalStrategy):
    """Constant gamma; the paper compares 0.8 and 0.6.

    Example:
        >>> float(FixedInterval(0.5).start(torch.ones(3), 4))
        0.5
    """

    def __init__(self, ratio: float) -> None:
        if not MIN_GAMMA <= ratio <= 1:
            raise ConfigurationError(f"ratio={ratio}: expected a share of the largest gradient in [0.001, 1].")
        self.ratio = ratio

    def start(self, magnitude: Tensor, bits: int) -> Tensor:
        """Return the constant."""
        return magnitude.new_tensor(self.ratio)


class MinMaxInterval(FixedInterval):
    """Gamma of 1: nothing is clipped.

    Example:
        >>> float(MinMaxInterval().start(torch.ones(3), 4))
        1.0
    """

    def __init__(self) -> None:
        super().__init__(1.0)


class MinimumErrorInterval(IntervalStrategy):
    """Gamma of the least error of the entire gradient: direction-sensitive clipping.

    The error is the cosine distance between G and its stochastically rounded version, in expectation; the
    search is repeated every few optimizer steps (as UI8, arXiv 1912.12607, and DSGC do). It runs over a histogram of
    abs(G) whose cells carry their own means.

    Args:
        every: Number of optimizer steps from one search to the next, at least 1.
        candidates: Number of gammas that are compared, in equal steps up to 1.

    Example:
        >>> g = torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([20.0])])
        >>> bool(MinimumErrorInterval().start(g, 4) < 0.2)
        True
    """

    bins = 4096

    def __init__(self, every: int = 100, candidates: int = 100) -> None:
        if every < 1 or candidates < 1:
            raise ConfigurationError(f"every={every}, candidates={candidates}: both are at least 1.")
        self.every = every
        self.candidates = candidates

    def start(self, magnitude: Tensor, bits: int) -> Tensor:
        """Choose the candidate of the least cosine distance."""
        flat = magnitude.flatten()
        relative = flat / flat.max().clamp_min(torch.finfo(flat.dtype).tiny)
        cell = (relative * (self.bins - 1)).long()
        weight = flat.new_zeros(self.bins, dtype=torch.float64).index_add_(0, cell, torch.ones_like(flat).double())
        mean = torch.zeros_like(weight).index_add_(0, cell, relative.double()) / weight.clamp_min(1)
        gamma = torch.arange(1, self.candidates + 1, device=flat.device).double() / self.candidates
        width = gamma[:, None] / (2 ** (bits - 1) - 1)
        clamped = torch.minimum(mean, gamma[:, None])
        fraction = clamped / width - (clamped / width).floor()
        # A stochastically rounded v has the expectation v and the variance width^2 * f * (1 - f).
        dot = (weight * mean * clamped).sum(1)
        square = (weight * (clamped.square() + width.square() * fraction * (1 - fraction))).sum(1)
        return gamma[(dot / square.sqrt()).argmax()].float()
