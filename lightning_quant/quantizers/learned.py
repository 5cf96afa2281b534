"""Quantizer with a learned range."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_quant.errors import CheckpointError
from lightning_quant.functional.grid import Grid, fake_quantize, symmetric_grid, unsigned_grid
from lightning_quant.quantizers.base import UNDECIDED, Quantizer
from lightning_quant.quantizers.statistics import moments


class _Start:
    """Sign and initial range that a quantizer shares with copies made before its first tensor.

    The averaged copy of a network is one of them. It needs the same grid, and averaging would never replace its NaN.

    Attributes:
        sign: Whether the tensor has negative values; None until known.
        waiting: Quantizers that have no range yet.
    """

    def __init__(self, sign: bool | None) -> None:
        self.sign = sign
        self.waiting: WeakSet[LearnedQuantizer] = WeakSet()

    def __deepcopy__(self, memo: dict[int, object]) -> _Start:
        return self if self.waiting else _Start(self.sign)

    def __reduce__(self) -> tuple[object, ...]:
        return _Start, (self.sign,)


class LearnedQuantizer(Quantizer, kind=1):
    """Uniform per-tensor quantizer with a learned range: [-range, range], or [0, range] for non-negative tensors.

    The range starts at three standard deviations. A non-negative tensor is taken for one half of a normal distribution,
    which gives ``3 std(x) / sqrt(1 - 2/pi)`` (arXiv 2407.12637, section 3). The range is a buffer with one FP32 element
    that requires a gradient: pass ``quantizer.range`` to an optimizer to learn it.

    Args:
        bits: Bit-width, 2 to 16.
        signed: Whether the tensor has negative values; None decides on the first tensor.

    Attributes:
        sample: Values of the tensor from the last backward pass since the optimizer step; None before.

    Shape:
        Any shape; the output has the shape and dtype of the input.

    Example:
        >>> quantizer = LearnedQuantizer(4)
        >>> quantizer.initialize(torch.arange(16.0))
        >>> quantizer.signed, quantizer(torch.tensor([-1.0, 100.0])).tolist()[0]
        (False, 0.0)
    """

    range: Tensor
    scalar_state = True

    def __init__(self, bits: int, signed: bool | None = None) -> None:
        super().__init__(bits)
        self._start = _Start(signed)
        self._start.waiting.add(self)
        self.decides_sign = signed is None
        self.sample: Tensor | None = None
        self._signed_grid, self._unsigned_grid = symmetric_grid(bits), unsigned_grid(bits)
        self.register_buffer("range", torch.tensor(float("nan")).requires_grad_())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.ready:
            self._start.waiting.add(self)

    @property
    def signed(self) -> bool | None:
        """Whether the tensor has negative values; None until known."""
        return self._start.sign

    @property
    def grid(self) -> Grid:
        """Symmetric grid for signed tensors, codes 0 .. 2^b-1 for others."""
        return self._unsigned_grid if self.signed is False else self._signed_grid

    @property
    def scale(self) -> Tensor:
        """Step size ``abs(range) / largest code``, differentiable, never 0."""
        return (self.range.abs() / self.grid.high).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set range and sign from the first tensor, over all ranks. A tensor that is not finite or all 0 is skipped."""
        statistics = moments(x.detach())
        if not math.isfinite(statistics.std) or statistics.largest == 0:
            return
        signed = statistics.has_negative if self.decides_sign else self.signed
        spread = 3 * statistics.std / (1 if signed else math.sqrt(1 - 2 / math.pi))
        if spread < abs(statistics.mean):
            # Values that are far from 0 and close together, such as pooled ones, would nearly all be clipped and get no
            # gradient. Three times the root mean square equals three standard deviations where the mean is 0.
            spread = min(3 * math.hypot(statistics.mean, statistics.std), statistics.largest)
        # Only copies that are not ready: one that is trained on its own starts from its own first tensor.
        for quantizer in {self, *(copy for copy in self._start.waiting if not copy.ready)}:
            quantizer._start = _Start(signed)
            quantizer.range.fill_(spread)
        self.ready = True

    def unstarted_state(self) -> dict[str, Tensor]:
        state = super().unstarted_state()
        if self.decides_sign:
            # The sign follows the format version, the kind and the bit-width.
            state["_extra_state"][3] = UNDECIDED
        return state

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, keeping its shape and dtype. Acts as the identity until it is initialized."""
        return fake_quantize(x, self.scale, self.grid) if self.ready else x

    def affine(self, ndim: int) -> tuple[Tensor, None]:
        """Return the scale, which broadcasts to any tensor, and no zero point."""
        return self.scale, None

    def affine_of(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the scale, and no zero point."""
        return self.affine(x.dim())

    @classmethod
    def from_signature(cls, signature: list[int]) -> LearnedQuantizer:
        bits, signed, decides = signature
        return cls(bits, None if decides else bool(signed))

    def _signature(self) -> list[int]:
        return [self.bits, UNDECIDED if self.signed is None else int(self.signed), int(self.decides_sign)]

    def _restore(self, signature: list[int]) -> None:
        loaded = None if signature[1] == UNDECIDED else bool(signature[1])
        if self.decides_sign:
            self._start = _Start(loaded)
        elif loaded not in (None, self.signed):
            raise CheckpointError(
                f"The checkpoint has signed={loaded} for a tensor that this module quantizes with signed={self.signed}:"
                f" write signed={loaded}, or signed=None to use the sign of the checkpoint."
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.range.requires_grad_()
        if self.ready:
            self._start = _Start(self.signed)
        if self.ready and self.signed is None:
            raise CheckpointError(
                "The checkpoint holds a range but does not say whether it is signed: it was averaged or edited after"
                " it was written. Load the original one."
            )
