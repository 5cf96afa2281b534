"""A quantizer whose range is learned."""

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
    """What a quantizer shares with the copies that are made of it before its first tensor: sign and first range.

    An average of a network is such a copy. It must be on the same grid, and NaN would stay NaN however it is averaged.

    Attributes:
        sign: Whether the tensor has negative values, None until that is known.
        waiting: The quantizers whose range is still missing.
    """

    def __init__(self, sign: bool | None) -> None:
        self.sign = sign
        self.waiting: WeakSet[LearnedQuantizer] = WeakSet()

    def __deepcopy__(self, memo: dict[int, object]) -> _Start:
        return self if self.waiting else _Start(self.sign)

    def __reduce__(self) -> tuple[object, ...]:
        return _Start, (self.sign,)


class LearnedQuantizer(Quantizer, kind=1):
    """Uniform, per tensor, with a learned range: [-range, range], or [0, range] for a tensor without negatives.

    The range starts at three standard deviations, for one-signed tensors at those of the normal distribution
    whose half they would be: ``3 std(x) / sqrt(1 - 2/pi)`` (arXiv 2407.12637, section 3). It is a buffer of one
    FP32 element that requires a gradient: give ``quantizer.range`` to an optimizer to learn it.

    Args:
        bits: 2..16.
        signed: None decides on the first tensor: "has it a negative value?"

    Attributes:
        sample: Values of the tensor in the last backward pass since an optimizer stepped, None before.

    Shape:
        any input; the output has its shape and dtype.

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
        self.register_buffer("range", torch.tensor(float("nan")).requires_grad_())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.ready:
            self._start.waiting.add(self)

    @property
    def signed(self) -> bool | None:
        """Whether the tensor has negative values; None until that is known."""
        return self._start.sign

    @property
    def grid(self) -> Grid:
        """Symmetric codes for signed tensors, 0 .. 2^b-1 for others."""
        return unsigned_grid(self.bits) if self.signed is False else symmetric_grid(self.bits)

    @property
    def scale(self) -> Tensor:
        """Step size ``abs(range) / largest code``, differentiable, never 0."""
        return (self.range.abs() / self.grid.high).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Range and sign from the first tensor, over the tensors of all ranks; waits for one that is not 0."""
        seen = moments(x.detach())
        if not math.isfinite(seen.std) or seen.largest == 0:
            return
        signed = seen.has_negative if self.decides_sign else self.signed
        spread = 3 * seen.std / (1 if signed else math.sqrt(1 - 2 / math.pi))
        if spread < abs(seen.mean):
            # Values far from 0 that lie close together, as pooled ones do: nearly all would be clipped, and pass no
            # gradient. Three times their root mean square is the same as the above where the mean is 0.
            spread = min(3 * math.hypot(seen.mean, seen.std), seen.largest)
        # Copies are not ready yet: one that is trained itself starts from the first tensor that it sees.
        for quantizer in {self, *(copy for copy in self._start.waiting if not copy.ready)}:
            quantizer._start = _Start(signed)
            quantizer.range.fill_(spread)
        self.ready = True

    def unstarted_state(self) -> dict[str, Tensor]:
        state = super().unstarted_state()
        if self.decides_sign:
            # After the format's version, the kind and the bit-width.
            state["_extra_state"][3] = UNDECIDED
        return state

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid, in the shape and dtype of ``x``; the identity before :meth:`initialize`."""
        return fake_quantize(x, self.scale, self.grid) if self.ready else x

    def affine(self, ndim: int) -> tuple[Tensor, None]:
        """Scale, which broadcasts to any tensor, and no zero point."""
        return self.scale, None

    def affine_of(self, x: Tensor) -> tuple[Tensor, None]:
        """The one scale, and no zero point."""
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
                f" write signed={loaded}, or signed=None to take what the checkpoint says."
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.range.requires_grad_()
        if self.ready:
            self._start = _Start(self.signed)
        if self.ready and self.signed is None:
            raise CheckpointError(
                "The checkpoint holds a range without saying whether it is signed: it was averaged or edited after it"
                " was written. Load the one that training wrote."
            )
