"""Base class of quantizers: FP32 state that is saved with the weights and checked when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError, UnsupportedModelError
from lightning_quant.functional.grid import Grid, check_bits

UNDECIDED = -1
FORMAT_VERSION = 2

# Number of each quantizer class in state dicts, and where the class is defined. It is imported only when a state is
# read, so that packages above this one can be listed. Other classes register with `class Mine(Quantizer, kind=100)`.
KINDS = {
    1: "lightning_quant.quantizers.learned:LearnedQuantizer",
    2: "lightning_quant.quantizers.fixed:FixedQuantizer",
    3: "lightning_quant.gradient.quantizer:GradientQuantizer",
    4: "lightning_quant.quantizers.grouped:GroupQuantizer",
    5: "lightning_quant.quantizers.grouped:RowGroupQuantizer",
    6: "lightning_quant.quantizers.dynamic:TokenQuantizer",
    7: "lightning_quant.quantizers.dynamic:ChannelQuantizer",
    9: "lightning_quant.quantizers.dynamic:LogQuantizer",
    10: "lightning_quant.quantizers.timestep:TimestepQuantizer",
    11: "lightning_quant.quantizers.rounded:RoundedQuantizer",
}


class Quantizer(nn.Module):
    """Base class of quantizers of one tensor: a bit-width, and buffers for the range that are NaN until initialized.

    Ranges are buffers rather than parameters, so that the user's optimizer, weight decay and gradient clipping do not
    touch them. They stay in FP32 when the module is cast to another dtype.

    Args:
        bits: Bit-width, 2 to 16.

    Attributes:
        kind: Number of the class in state dicts, set with ``class Mine(Quantizer, kind=100)``. A subclass without a
            number is saved as its parent class.
        scalar_state: Whether buffers are single numbers. Otherwise they take the shape of the loaded state, since the
            number of ranges is known only after calibration.

    Raises:
        ConfigurationError: The bit-width is not in 2..16.
        CheckpointError: The loaded state belongs to another quantizer class or bit-width.
    """

    kind: ClassVar[int] = 0
    scalar_state: ClassVar[bool] = False

    def __init_subclass__(cls, kind: int | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is None:
            return
        home = f"{cls.__module__}:{cls.__qualname__}"
        if KINDS.setdefault(kind, home) != home:
            raise ConfigurationError(
                f"kind={kind} of {cls.__name__} is taken by {KINDS[kind]}: write another number, for example"
                f" kind={max(100, *KINDS) + 1}."
            )
        cls.kind = kind

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.ready = False

    @property
    def grid(self) -> Grid:
        """Smallest and largest code."""
        raise NotImplementedError

    def initialize(self, x: Tensor) -> None:
        """Set the range from the first tensor. An all-zero ``x`` leaves the quantizer uninitialized.

        Raises:
            QuantizationError: The range of this class comes from calibration only, and it was not calibrated.
        """
        self.refresh_ready()
        if not self.ready:
            raise QuantizationError(
                f"This {type(self).__name__} has no range, and it cannot be set from a single batch: calibrate first,"
                " Trainer(callbacks=[IGQViT(...)]).test(module, data), or go back to float with"
                " lightning_quant.strip(module)."
            )

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return the scale and zero point (None for 0) of each value of ``x``, broadcastable to ``x``.

        Returns None for a quantizer with non-uniform steps.
        """
        return None

    def check(self, weight: Tensor) -> None:
        """Raise an error if the state was computed for another weight. By default any weight is accepted.

        Args:
            weight: Weight of the layer, before it is quantized.
        """

    def knows(self, weight: Tensor) -> bool:
        """Return whether the state was computed for exactly this weight."""
        return False

    def adopt(self, weight: Tensor) -> None:
        """Register ``weight`` as the one for which the state was computed."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise an error in ``torch.jit.script``, which calls this hook of each module."""
        raise UnsupportedModelError(
            f"torch.jit.script does not support quantized networks, and this one contains a {type(self).__name__}: save"
            " it with lightning_quant.save_quantized, or script the float network, lightning_quant.strip(network)."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in buffers.items():
            device = self._buffers[name].device  # type: ignore[union-attr]
            # On the same device the tensor object stays the same, since an optimizer may hold it.
            moved = before if before.device == device else before.detach().to(device)
            self._buffers[name] = moved.requires_grad_(before.requires_grad)
        return self

    @classmethod
    def from_signature(cls, signature: list[int]) -> Quantizer:
        """Create an uninitialized quantizer from its :meth:`_signature`."""
        return cls(signature[0])

    def _signature(self) -> list[int]:
        """Return the settings that must match when a state is loaded, as whole numbers with the bit-width first."""
        return [self.bits]

    def _restore(self, signature: list[int]) -> None:
        """Apply the settings of a loaded signature beyond the bit-width."""

    def get_extra_state(self) -> Tensor:
        """Return format version, kind and signature as a tensor: users move and clone the values of a state dict."""
        return torch.tensor([FORMAT_VERSION, self.kind, *self._signature()])

    def set_extra_state(self, state: Any) -> None:
        """Check the version, kind and bit-width of a loaded state against this quantizer."""
        kind, signature = read_state(state)
        if kind != self.kind:
            raise CheckpointError(
                f"The checkpoint holds a {_name(kind)} for a tensor that this module quantizes with a"
                f" {type(self).__name__}: quantize the module as it was for the checkpoint, load the checkpoint into a"
                " float module, which adopts its structure, or start from a float checkpoint."
            )
        bits = signature[0]
        if bits != self.bits:
            raise CheckpointError(
                f"The checkpoint was made with {bits} bits for a tensor that this module quantizes with {self.bits}:"
                f" write {bits} bits for it (weight_bits, activation_bits or gradient_bits), or start from a float"
                " checkpoint."
            )
        self._restore(signature)

    def unstarted_state(self) -> dict[str, Tensor]:
        """Return the state of this quantizer before its first tensor."""
        state = self.state_dict()
        return {key: torch.full_like(v, float("nan")) if v.is_floating_point() else v for key, v in state.items()}

    def refresh_ready(self) -> None:
        """Update ``ready`` after a range was copied into the buffers from outside, as weight averaging does."""
        self.ready = all(not bool(buffer.isnan().any()) for buffer in self._buffers.values() if buffer is not None)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if loaded is None or buffer is None or loaded.shape == buffer.shape:
                continue
            if self.scalar_state:  # PyTorch 2.6 would take the first of several numbers.
                raise CheckpointError(
                    f"size mismatch for {prefix}{name}: the checkpoint has {tuple(loaded.shape)}, this"
                    f" {type(self).__name__} a single number. The checkpoint was edited: load the original one."
                )
            self._buffers[name] = buffer.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh_ready()
        for name, buffer in self._buffers.items():
            missing = torch.zeros(()) if buffer is None else buffer.isnan()
            if bool(missing.any()) and not bool(missing.all()):
                raise CheckpointError(
                    f"{prefix}{name}: {int(missing.sum())} of {missing.numel()} numbers are NaN, so the range of this"
                    f" {type(self).__name__} is incomplete. The checkpoint was edited: load the original one, or"
                    " calibrate again."
                )

    def extra_repr(self) -> str:
        """Return the bit-width and whether the range is set."""
        return f"bits={self.bits}, ready={self.ready}"


def read_state(state: Tensor) -> tuple[int, list[int]]:
    """Return the kind and signature in the extra state of a quantizer.

    Raises:
        CheckpointError: The version of the format is unknown.
    """
    version, *rest = (int(value) for value in state)
    if version != FORMAT_VERSION or len(rest) < 2:
        raise CheckpointError(
            f"The checkpoint has version {version} of the quantizer state, but this lightning_quant reads version"
            f" {FORMAT_VERSION}: load it with the lightning_quant that wrote it."
        )
    return rest[0], rest[1:]


def quantizer_of_state(state: Tensor) -> Quantizer:
    """Create the uninitialized quantizer that an extra state describes.

    Raises:
        CheckpointError: The version or the quantizer class is unknown.

    Example:
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> quantizer_of_state(FixedQuantizer(6, axis=0).get_extra_state())
        FixedQuantizer(bits=6, ready=False)
    """
    kind, signature = read_state(state)
    name = _name(kind)
    try:
        quantizer_class: object = getattr(import_module(KINDS[kind].partition(":")[0]), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint holds quantizers of kind {kind}, {KINDS[kind]}, which cannot be imported: {error}. Install"
            " the lightning_quant that wrote it."
        ) from error
    return cast("type[Quantizer]", quantizer_class).from_signature(signature)


def _name(kind: int) -> str:
    """Return the class name of a kind."""
    if kind not in KINDS:
        raise CheckpointError(
            f"The checkpoint holds quantizers of kind {kind}, which this lightning_quant does not know: load it with"
            f" the lightning_quant that wrote it, or import the module that defines the class with kind={kind} first."
        )
    return KINDS[kind].partition(":")[2]


def check_axis(axis: int | None, ndim: int) -> None:
    """Raise a ConfigurationError if a tensor of ``ndim`` dimensions has no such axis."""
    if axis is not None and not -ndim <= axis < ndim:
        raise ConfigurationError(f"axis={axis}: the tensor has {ndim} dimensions.")
