"""A quantizer whose range is estimated from data and then stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_quant.errors import CheckpointError
from lightning_quant.functional.grid import Grid, fake_quantize, per_channel, symmetric_grid, unsigned_grid
from lightning_quant.functional.ranges import min_max, scale_and_zero_point
from lightning_quant.quantizers.base import Quantizer, check_axis

RangeEstimator = Callable[..., tuple[Tensor, Tensor]]


class FixedQuantizer(Quantizer):
    """Uniform, symmetric or with a zero point, per tensor or per channel, range estimated once.

    Args:
        bits: 2..16.
        symmetric: codes around 0, or 0 .. 2^b-1 with a zero point.
        axis: None for one range, else one for each index of this axis.
        estimator: from a tensor and ``axis`` to its (low, high); default min-max. Bind arguments with
            ``functools.partial``, for example ``partial(percentile, keep=99.9)``.

    >>> quantizer = FixedQuantizer(8, axis=0)
    >>> quantizer.initialise(torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]))
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

    @property
    def grid(self) -> Grid:
        """Symmetric codes, or 0 .. 2^b-1."""
        return symmetric_grid(self.bits) if self.symmetric else unsigned_grid(self.bits)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Scale and zero point from ``x``; waits for a tensor that is finite and not all 0."""
        check_axis(self.axis, x.dim())
        low, high = self.estimator(x.detach().float(), axis=self.axis)
        # Of all of x: an estimator may have cut off what is not finite.
        if not bool(x.isfinite().all() & (low.abs() + high.abs()).any()):
            return
        self.scale, zero_point, _ = scale_and_zero_point(low, high, self.bits, self.symmetric)
        self.zero_point = torch.zeros_like(self.scale) if zero_point is None else zero_point
        self.ready = True

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid, in the shape and dtype of ``x``; the identity before :meth:`initialise`."""
        if not self.ready:
            return x
        scale, zero_point = self.scale, self.zero_point
        if self.axis is not None:
            scale, zero_point = (per_channel(p, self.axis, x.dim()) for p in (scale, zero_point))
        return fake_quantize(x, scale, self.grid, None if self.symmetric else zero_point)

    def _signature(self) -> list[int]:
        return [self.bits, int(self.symmetric)]

    def _restore(self, signature: list[int]) -> None:
        if signature[1] != int(self.symmetric):
            raise CheckpointError(
                f"The checkpoint has symmetric={bool(signature[1])} for a tensor that this module quantizes with"
                f" symmetric={self.symmetric}: write symmetric={bool(signature[1])}."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                # One value a channel, known only once calibrated: take the shape of what is loaded.
                self._buffers[name] = torch.empty_like(state_dict[prefix + name], device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
