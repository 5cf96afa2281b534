"""Weight quantizer with learned rounding: it stores for each weight whether it is rounded up or down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from lightning_quant.errors import QuantizationError
from lightning_quant.functional.grid import decode, encode
from lightning_quant.functional.rounding import from_fraction, hard_rounding, soft_rounding
from lightning_quant.quantizers.fixed import FixedQuantizer
from lightning_quant.quantizers.identity import Mark, fingerprint, mark

if TYPE_CHECKING:
    from typing_extensions import Self

# Initial |alpha| of a weight that was not rounded to its nearest code: on the side of its code, close to the edge.
MARGIN = 0.1


@dataclass
class _Learning:
    """Variables of the rounding while it is learned. Afterwards only the codes remain."""

    base: Tensor
    alpha: Tensor
    log_ratio: Tensor
    soft: bool


@dataclass
class _Held:
    """Weight of one update: the function of the variables, and the leaf in which its gradients accumulate."""

    versions: tuple[int, int]
    function: Tensor
    leaf: Tensor


class RoundedQuantizer(FixedQuantizer, kind=11):
    """Uniform quantizer of a weight, like :class:`FixedQuantizer`, with a stored code instead of the nearest one.

    Between :meth:`begin` and :meth:`end` the rounding is a function of one variable per weight, which is learned
    (AdaRound, arXiv 2004.10568): ``code = floor(w / scale) + h(alpha)``, with the rectified sigmoid h, or with
    ``alpha >= 0`` and the gradient of h.

    Attributes:
        codes: Codes in the shape of the weight, uint8 up to 8 bits; empty before :meth:`initialize`.
        fingerprint: Checksum of the weight for which the codes were computed; 0 if unknown.
        holds: Whether to compute the learned weight once for all calls between two changes of the variables. Its
            gradients then wait for :meth:`release`. With several calls per update this saves most of the cost of
            learning.

    Example:
        >>> weight = torch.tensor([[0.4, 1.0], [-0.2, 3.0]])
        >>> quantizer = RoundedQuantizer(2, symmetric=False, axis=0)
        >>> quantizer.initialize(weight)
        >>> leaves = quantizer.begin(weight)
        >>> with torch.no_grad():
        ...     _ = leaves["alpha"].sub_(3)  # round all weights down
        >>> quantizer.end()
        >>> [round(value, 2) for value in quantizer(weight)[0].tolist()]
        [0.33, 1.0]
    """

    codes: Tensor
    fingerprint: Tensor

    def __init__(self, bits: int, symmetric: bool = False, axis: int | None = 0, estimator=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(bits, symmetric, axis, **({} if estimator is None else {"estimator": estimator}))
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8 if bits <= 8 else torch.int32))
        self.register_buffer("fingerprint", torch.zeros((), dtype=torch.int64))
        self._checked: tuple[ref[Tensor], Mark] | None = None
        self._learning: _Learning | None = None
        self.holds = False
        self._held: _Held | None = None

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and zero point from ``x``, and the nearest codes."""
        super().initialize(x)
        if self.ready:
            scale, zero_point = self.affine(x.dim())
            self._store(encode(x.detach(), scale, self.grid, zero_point))
            self.adopt(x)

    def unstarted_state(self) -> dict[str, Tensor]:
        return {**super().unstarted_state(), "codes": self.codes.new_empty(0)}

    def _store(self, codes: Tensor) -> None:
        # Symmetric codes start below 0.
        self.codes = (codes - self.grid.low).to(self.codes.dtype)
        self._cached = None

    @property
    def signed_codes(self) -> Tensor:
        """Codes from the grid's ``low`` to its ``high``, FP32."""
        return self.codes.float() + self.grid.low

    # -- identity of the weight ----------------------------------------------------------------------------------------

    def check(self, weight: Tensor) -> None:
        """Raise an error if the weight changed since its codes were learned, or if it is about to be trained.

        Args:
            weight: Weight of the layer, before it is quantized.

        Raises:
            QuantizationError: The weight is another one, or requires a gradient in training mode.
        """
        if not self.ready or self.learns or weight.is_meta or torch.compiler.is_compiling():
            return
        if self.training and torch.is_grad_enabled() and weight.requires_grad:
            raise QuantizationError(
                f"A weight of shape {tuple(weight.shape)}, whose rounding was learned by calibration, is used in"
                " training mode with gradients and would get none. To evaluate it, write model.eval(). To train it,"
                " write lightning_quant.strip(model) first, and calibrate again afterwards. To train only other"
                " parameters, freeze it with weight.requires_grad_(False)."
            )
        if self._checked is not None and self._checked[0]() is weight and self._checked[1] == mark(weight):
            return
        if not int(self.fingerprint):
            self.adopt(weight)
        elif not self.knows(weight):
            raise QuantizationError(
                f"A weight of shape {tuple(weight.shape)} was changed after its rounding was learned by calibration (a"
                " fused adapter, an averaged copy, pruning, a new parameter), and the change would have no effect on"
                " the output. Write lightning_quant.strip(model), which keeps the current weights, and calibrate again;"
                " or load the weights that were calibrated."
            )
        self._checked = ref(weight), mark(weight)

    def knows(self, weight: Tensor) -> bool:
        """Return whether the codes were computed for this weight, bit for bit."""
        return not weight.is_meta and int(self.fingerprint) == int(fingerprint(weight))

    def adopt(self, weight: Tensor) -> None:
        """Register ``weight`` as the one for which the codes were computed."""
        if not weight.is_meta:
            self.fingerprint.copy_(fingerprint(weight))

    def train(self, mode: bool = True) -> Self:
        """Change the mode and check the weight again at the next call."""
        self._checked = None
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}codes" in state_dict:
            # States of earlier versions have no fingerprint.
            state_dict.setdefault(f"{prefix}fingerprint", torch.zeros_like(self.fingerprint))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- rounding -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized weight in the dtype of ``x``. Acts as the identity until it is initialized."""
        if self._learning is None:
            return super().forward(x)
        return (self._hold().leaf if self.holds else self._learned()).to(x.dtype)

    def _quantize(self, x: Tensor) -> Tensor:
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
        """Propagate the gradients that accumulated in the held weight to the variables."""
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
        # The held weight is a function of the variables and is computed again.
        return {**super().__getstate__(), "_held": None, "_checked": None}

    @property
    def learns(self) -> bool:
        """Whether the quantizer is between :meth:`begin` and :meth:`end`."""
        return self._learning is not None

    def begin(self, weight: Tensor, soft: bool = False, margin: float = MARGIN) -> dict[str, Tensor]:
        """Start learning from the current codes.

        Args:
            weight: Float weight.
            soft: Whether to round with the rectified sigmoid, which a regularizer drives to 0 or 1, instead of
                straight-through.
            margin: Initial magnitude of the variable where the code is not the nearest one.

        Returns:
            Leaf tensors: ``alpha`` in the shape of the weight, and ``log_ratio``, the logarithm of the ratio of the
            scale to its initial value, which broadcasts to the weight.

        Raises:
            QuantizationError: The quantizer is not initialized.
        """
        if not self.ready:
            raise QuantizationError("The quantizer has no range yet: call initialize(weight) before begin(weight).")
        scale, zero_point = self.affine(weight.dim())
        position = weight.detach().float() / scale
        base, codes = position.floor() + (0 if zero_point is None else zero_point), self.signed_codes
        # After the scale was learned, some weights lie a step or more away from their codes.
        near = (codes >= base.clamp(*self.grid)) & (codes <= (base + 1).clamp(*self.grid))
        base = torch.where(near, base, codes)
        up = codes > base
        alpha = from_fraction(position - position.floor())
        alpha = torch.where((alpha >= 0) == up, alpha, torch.where(up, margin, -margin))
        self._learning = _Learning(base, alpha.requires_grad_(), torch.zeros_like(scale).requires_grad_(), soft)
        return {"alpha": alpha, "log_ratio": self._learning.log_ratio}

    @torch.no_grad()
    def end(self) -> None:
        """Store what was learned. Does nothing if :meth:`begin` was not called."""
        learning, self._learning = self._learning, None
        self.holds, self._held = False, None
        if learning is not None:
            self._store((learning.base + (learning.alpha >= 0)).clamp(self.grid.low, self.grid.high))
            self.scale = self.scale * learning.log_ratio.exp().reshape(self.scale.shape)

    def cancel(self) -> None:
        """Discard what was learned."""
        self._learning, self._held, self.holds = None, None, False
