"""Quantizer with a range that is estimated once from data and then fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.functional.grid import Grid, fake_quantize, per_channel, symmetric_grid, unsigned_grid
from lightning_quant.functional.ranges import min_max, scale_and_zero_point
from lightning_quant.quantizers.base import Quantizer, check_axis
from lightning_quant.quantizers.identity import mark

if TYPE_CHECKING:
    from typing_extensions import Self

RangeEstimator = Callable[..., tuple[Tensor, Tensor]]


class FixedQuantizer(Quantizer, kind=2):
    """Uniform quantizer with a range estimated once: symmetric or with a zero point, per tensor or per channel.

    Args:
        bits: Bit-width, 2 to 16.
        symmetric: Whether codes are symmetric around 0. Otherwise they are 0 .. 2^b-1 with a zero point.
        axis: Axis with one range for each index, or None for a single range.
        estimator: Function of a tensor and ``axis`` that returns (low, high). Default: min-max. Bind further arguments
            with ``functools.partial``, for example ``partial(percentile, keep=99.9)``.

    Example:
        >>> quantizer = FixedQuantizer(8, axis=0)
        >>> quantizer.initialize(torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]))
        >>> quantizer.scale.tolist() == [1 / 127, 2 / 127]
        False
        >>> quantizer(torch.tensor([[5.0, 0.0], [5.0, 0.0]])).tolist()
        [[1.0, 0.0], [2.0, 0.0]]
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, bits: int, symmetric: bool = True, axis: int | None = None, estimator: RangeEstimator = min_max
    ) -> None:
        super().__init__(bits)
        self.symmetric, self.axis, self.estimator = symmetric, axis, estimator
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("zero_point", torch.tensor(float("nan")))
        self._cached: tuple[tuple[float, ...], tuple[ref[Tensor], ...], Tensor] | None = None

    @property
    def grid(self) -> Grid:
        """Symmetric grid, or codes 0 .. 2^b-1."""
        return symmetric_grid(self.bits) if self.symmetric else unsigned_grid(self.bits)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and zero point from ``x``. A tensor that is not finite or is all 0 is skipped."""
        check_axis(self.axis, x.dim())
        low, high = self.estimator(x.detach().float(), axis=self.axis)
        # Check all of x, since an estimator may have cut off the values that are not finite.
        if not bool(x.isfinite().all() & (low.abs() + high.abs()).any()):
            return
        self.scale, zero_point, _ = scale_and_zero_point(low, high, self.bits, self.symmetric)
        self.zero_point = torch.zeros_like(self.scale) if zero_point is None else zero_point
        self.ready = True

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, keeping its shape and dtype. Acts as the identity until it is initialized."""
        if not self.ready:
            return x
        # A compiled network computes the weight in its graph.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not isinstance(x, nn.Parameter):
            return self._quantize(x)
        return self._quantize(x) if x.is_inference() else self._quantize_weight(x)

    def _quantize(self, x: Tensor) -> Tensor:
        scale, zero_point = self.affine(x.dim())
        return fake_quantize(x, scale, self.grid, zero_point)

    def _quantize_weight(self, weight: nn.Parameter) -> Tensor:
        """Quantize a weight once and reuse the result, since a weight does not change in evaluation.

        A write through ``weight.data`` on an accelerator takes effect after the next ``train()`` or ``eval()``.
        """
        key = (*mark(weight), *(t._version for t in (self.scale, self.zero_point)))
        same = (weight, self.scale, self.zero_point)
        cached = self._cached
        if cached is None or cached[0] != key or any(a() is not b for a, b in zip(cached[1], same, strict=True)):
            cached = self._cached = (key, tuple(ref(t) for t in same), self._quantize(weight))
        return cached[2]

    def train(self, mode: bool = True) -> Self:
        """Change the mode and discard the cached weight."""
        self._cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_cached": None}

    def affine(self, ndim: int) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point (None if symmetric), broadcastable to a tensor of ``ndim`` dimensions."""
        scale, zero_point = self.scale, self.zero_point
        if self.axis is not None:
            scale, zero_point = (per_channel(p, self.axis, ndim) for p in (scale, zero_point))
        return scale, None if self.symmetric else zero_point

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the result of :meth:`affine` for the dimensions of ``x``."""
        return self.affine(x.dim())

    @classmethod
    def from_signature(cls, signature: list[int]) -> FixedQuantizer:
        bits, symmetric, axis = signature
        return cls(bits, bool(symmetric), _axis_of(axis))

    def _signature(self) -> list[int]:
        axis = 0 if self.axis is None else self.axis + (self.axis >= 0)
        return [self.bits, int(self.symmetric), axis]

    def _restore(self, signature: list[int]) -> None:
        loaded = {"symmetric": bool(signature[1]), "axis": _axis_of(signature[2])}
        for name, value in loaded.items():
            if value != getattr(self, name):
                raise CheckpointError(
                    f"The checkpoint has {name}={value} for a tensor that this module quantizes with"
                    f" {name}={getattr(self, name)}: write {name}={value}."
                )


def _axis_of(number: int) -> int | None:
    """Decode the axis of a signature: 0 is None, negative axes are stored unchanged, others plus one."""
    return None if number == 0 else number - (number > 0)
