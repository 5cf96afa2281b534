"""A quantizer of weights that decides for each whether it is rounded up or down, and can learn it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.errors import QuantizationError
from lightning_quant.functional.grid import decode, encode
from lightning_quant.functional.soft_rounding import from_fraction, hard_rounding, soft_rounding
from lightning_quant.quantizers.fixed import FixedQuantizer

# Of the variable of a weight that was rounded against its fraction: on the side it was rounded to, close to the edge.
MARGIN = 0.1


@dataclass
class _Learning:
    """What is learned: in float while it lasts, in codes afterwards."""

    base: Tensor
    alpha: Tensor
    log_ratio: Tensor
    soft: bool


@dataclass
class _Held:
    """The weight of an update: its function of the variables, and the leaf that the network's gradients add up in."""

    versions: tuple[int, int]
    function: Tensor
    leaf: Tensor


class RoundedQuantizer(FixedQuantizer, kind=11):
    """Uniform, of a weight, as :class:`FixedQuantizer`, with a code kept for each weight instead of the nearest one.

    Between :meth:`begin` and :meth:`end` the rounding is a function of a variable for each weight, which a loss
    decides (AdaRound, arXiv 2004.10568): ``code = floor(w / scale) + h(alpha)``, by the rectified sigmoid h, or
    by ``alpha >= 0`` with the gradient of h.

    Attributes:
        codes: of the shape of the weight, uint8 up to 8 bits; empty before :meth:`initialise`.
        holds: compute the learned weight once for all calls between two changes of the variables, whose gradients then
            wait for :meth:`release`: with several calls in an update this is most of the cost of learning.

    >>> weight = torch.tensor([[0.4, 1.0], [-0.2, 3.0]])
    >>> quantizer = RoundedQuantizer(2, symmetric=False, axis=0)
    >>> quantizer.initialise(weight)
    >>> leaves = quantizer.begin(weight)
    >>> with torch.no_grad():
    ...     _ = leaves["alpha"].sub_(3)  # now all is rounded down
    >>> quantizer.end()
    >>> [round(value, 2) for value in quantizer(weight)[0].tolist()]
    [0.33, 1.0]
    """

    codes: Tensor

    def __init__(self, bits: int, symmetric: bool = False, axis: int | None = 0, estimator=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(bits, symmetric, axis, **({} if estimator is None else {"estimator": estimator}))
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8 if bits <= 8 else torch.int32))
        self._learning: _Learning | None = None
        self.holds = False
        self._held: _Held | None = None

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Scale and zero point from ``x``, and the nearest codes."""
        super().initialise(x)
        if self.ready:
            scale, zero_point = self.affine(x.dim())
            self._keep(encode(x.detach(), scale, self.grid, zero_point))

    def unstarted_state(self) -> dict[str, Tensor]:
        return {**super().unstarted_state(), "codes": self.codes.new_empty(0)}

    def _keep(self, codes: Tensor) -> None:
        # Symmetric codes begin below 0.
        self.codes = (codes - self.grid.low).to(self.codes.dtype)
        self._kept = None

    @property
    def signed_codes(self) -> Tensor:
        """Codes of the grid, from its ``low`` to its ``high``, in FP32."""
        return self.codes.float() + self.grid.low

    def forward(self, x: Tensor) -> Tensor:
        """The weight that the codes stand for, in the dtype of ``x``; the identity before :meth:`initialise`."""
        if self._learning is None:
            return super().forward(x)
        return (self._hold().leaf if self.holds else self._learned()).to(x.dtype)

    def _of(self, x: Tensor) -> Tensor:
        scale, zero_point = self.affine(x.dim())
        return decode(self.signed_codes, scale, zero_point).to(x.dtype)

    def _hold(self) -> _Held:
        learning = self._learning
        assert learning is not None
        versions = (learning.alpha._version, learning.log_ratio._version)
        if self._held is None or self._held.versions != versions:
            with torch.enable_grad():
                function = self._learned()
            self._held = _Held(versions, function, function.detach().requires_grad_(function.requires_grad))
        return self._held

    def release(self) -> None:
        """Let the gradients that added up in the held weight flow on to the variables."""
        held, self._held = self._held, None
        if held is not None and held.leaf.grad is not None:
            held.function.backward(held.leaf.grad)  # type: ignore[no-untyped-call]

    def _learned(self) -> Tensor:
        learning = self._learning
        assert learning is not None
        rounding = soft_rounding if learning.soft else hard_rounding
        scale, zero_point = self.affine(learning.base.dim())
        codes = (learning.base + rounding(learning.alpha)).clamp(self.grid.low, self.grid.high)
        return decode(codes, scale * learning.log_ratio.exp(), zero_point)

    def __getstate__(self) -> dict[str, object]:
        # What is held is a function of the variables, and made again.
        return {**super().__getstate__(), "_held": None}

    @property
    def learns(self) -> bool:
        """Whether it is between :meth:`begin` and :meth:`end`."""
        return self._learning is not None

    def begin(self, weight: Tensor, soft: bool = False, margin: float = MARGIN) -> dict[str, Tensor]:
        """Start learning from the codes as they are.

        Args:
            weight: in float.
            soft: round by the rectified sigmoid, to be driven to 0 or 1 by a regulariser, and not straight-through.
            margin: where the codes are not the nearest, the size of their variable.

        Returns:
            the leaf tensors: ``alpha`` of the weight's shape, and ``log_ratio``, of the scale to what it was, which
            broadcasts to it.

        Raises:
            QuantizationError: before :meth:`initialise`.
        """
        if not self.ready:
            raise QuantizationError("The quantizer has no range yet: call initialise(weight) before begin(weight).")
        scale, zero_point = self.affine(weight.dim())
        position = weight.detach().float() / scale
        base, codes = position.floor() + (0 if zero_point is None else zero_point), self.signed_codes
        # A scale that was learned has moved some weights by a step or more from their codes.
        near = (codes >= base.clamp(*self.grid)) & (codes <= (base + 1).clamp(*self.grid))
        base = torch.where(near, base, codes)
        up = codes > base
        alpha = from_fraction(position - position.floor())
        alpha = torch.where((alpha >= 0) == up, alpha, torch.where(up, margin, -margin))
        self._learning = _Learning(base, alpha.requires_grad_(), torch.zeros_like(scale).requires_grad_(), soft)
        return {"alpha": alpha, "log_ratio": self._learning.log_ratio}

    @torch.no_grad()
    def end(self) -> None:
        """Take over what was learned; nothing where nothing was begun."""
        learning, self._learning = self._learning, None
        self.holds, self._held = False, None
        if learning is not None:
            self._keep((learning.base + (learning.alpha >= 0)).clamp(self.grid.low, self.grid.high))
            self.scale = self.scale * learning.log_ratio.exp().reshape(self.scale.shape)

    def cancel(self) -> None:
        """Forget what was learned."""
        self._learning, self._held, self.holds = None, None, False
