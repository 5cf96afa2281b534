"""What all quantizers share: state in FP32, kept with the weights, and checked when it is loaded."""

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

# What a state dict calls a class of quantizers, and where that class lives: imported when a state is read, so that
# rooms above this one may be named. Classes from elsewhere add themselves with `class Mine(Quantizer, kind=100)`.
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
    """A quantizer of one tensor: a bit-width and buffers that hold its range, NaN until :meth:`initialize`.

    Ranges are buffers and not parameters, so that no optimizer of the user's, no weight decay and no gradient
    clipping finds them. They stay in FP32 when the module is cast to another dtype.

    Args:
        bits: 2..16.

    Attributes:
        kind: the number of the class in state dicts, given with ``class Mine(Quantizer, kind=100)``; a subclass
            without one is written as its parent.
        scalar_state: whether buffers are single numbers; otherwise they take the shape of what is loaded, since
            how many ranges there are is only known once they are calibrated.

    Raises:
        ConfigurationError: for other bit-widths.
        CheckpointError: when the state of a quantizer of another class or bit-width is loaded.
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
                f"kind={kind} of {cls.__name__} is {KINDS[kind]}'s: write another number, for example"
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
        """Set the range from the first tensor; leaves the quantizer as it is where ``x`` is all zero.

        Raises:
            QuantizationError: A class whose range comes from a calibration alone, and has none.
        """
        self.refresh_ready()
        if not self.ready:
            raise QuantizationError(
                f"This {type(self).__name__} has no range, which a calibration finds and no single batch: calibrate"
                " first, Trainer(callbacks=[IGQViT(...)]).test(module, data), or go back to float with"
                " lightning_quant.strip(module)."
            )

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Scale and zero point (None for 0) that each value of ``x`` gets, broadcastable to it.

        None for a quantizer whose steps are not uniform.
        """
        return None

    def check(self, weight: Tensor) -> None:
        """Refuse a weight that the state is not of; a state that is of no certain weight refuses none.

        Args:
            weight: Weight of the layer, before it is quantized.
        """

    def knows(self, weight: Tensor) -> bool:
        """Whether the state is of a certain weight, and of this one."""
        return False

    def adopt(self, weight: Tensor) -> None:
        """Take a weight for the one that the state is of."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which asks each module for what to compile in its place."""
        raise UnsupportedModelError(
            f"torch.jit.script does not compile quantized networks, found a {type(self).__name__} in this one: save it"
            " with lightning_quant.save_quantized, or script the float network, lightning_quant.strip(network)."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            device = self._buffers[name].device  # type: ignore[union-attr]
            # On the same device it stays the tensor that an optimizer may hold.
            moved = before if before.device == device else before.detach().to(device)
            self._buffers[name] = moved.requires_grad_(before.requires_grad)
        return self

    @classmethod
    def from_signature(cls, signature: list[int]) -> Quantizer:
        """The quantizer, not ready yet, whose :meth:`_signature` this is."""
        return cls(signature[0])

    def _signature(self) -> list[int]:
        """What must agree before a state can be loaded, as whole numbers; the bit-width comes first."""
        return [self.bits]

    def _restore(self, signature: list[int]) -> None:
        """Takes over what a loaded signature says beyond the bit-width."""

    def get_extra_state(self) -> Tensor:
        """Format version, kind and signature as a tensor: users move and clone what a state dict holds as tensors."""
        return torch.tensor([FORMAT_VERSION, self.kind, *self._signature()])

    def set_extra_state(self, state: Any) -> None:
        """Check version, kind and bit-width of a loaded state against this quantizer's."""
        kind, signature = read_state(state)
        if kind != self.kind:
            raise CheckpointError(
                f"The checkpoint holds a {_name(kind)} for a tensor that this module quantizes with a"
                f" {type(self).__name__}: quantize the module as the checkpoint's was, load the checkpoint into a"
                " float module, which takes its structure, or start from a float checkpoint."
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
        """The state of this quantizer before it saw its first tensor."""
        state = self.state_dict()
        return {key: torch.full_like(v, float("nan")) if v.is_floating_point() else v for key, v in state.items()}

    def refresh_ready(self) -> None:
        """Notice a range that was copied into the buffers from outside, as averaging of weights does."""
        self.ready = all(not bool(buffer.isnan().any()) for buffer in self._buffers.values() if buffer is not None)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if loaded is None or buffer is None or loaded.shape == buffer.shape:
                continue
            if self.scalar_state:  # PyTorch 2.6 would take the first of several numbers.
                raise CheckpointError(
                    f"size mismatch for {prefix}{name}: the checkpoint has {tuple(loaded.shape)}, this"
                    f" {type(self).__name__} a single number. It was edited: load the one that training wrote."
                )
            self._buffers[name] = buffer.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh_ready()
        for name, buffer in self._buffers.items():
            missing = torch.zeros(()) if buffer is None else buffer.isnan()
            if bool(missing.any()) and not bool(missing.all()):
                raise CheckpointError(
                    f"{prefix}{name}: {int(missing.sum())} of {missing.numel()} numbers are NaN, so that this"
                    f" {type(self).__name__} has only a part of its range. The checkpoint was edited: load the one"
                    " that was written, or calibrate anew."
                )

    def extra_repr(self) -> str:
        """Bits and whether the range is known."""
        return f"bits={self.bits}, ready={self.ready}"


def read_state(state: Tensor) -> tuple[int, list[int]]:
    """Kind and signature in the extra state of a quantizer.

    Raises:
        CheckpointError: a version of the format that is not known here.
    """
    version, *rest = (int(value) for value in state)
    if version != FORMAT_VERSION or len(rest) < 2:
        raise CheckpointError(
            f"The checkpoint has version {version} of the quantizers' state, this lightning_quant reads version"
            f" {FORMAT_VERSION}: load it with the lightning_quant that wrote it."
        )
    return rest[0], rest[1:]


def quantizer_of_state(state: Tensor) -> Quantizer:
    """The quantizer, not ready yet, that an extra state describes.

    Raises:
        CheckpointError: an unknown version, or a class of quantizers that is not known here.

    Example:
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> quantizer_of_state(FixedQuantizer(6, axis=0).get_extra_state())
        FixedQuantizer(bits=6, ready=False)
    """
    kind, signature = read_state(state)
    name = _name(kind)
    try:
        found: object = getattr(import_module(KINDS[kind].partition(":")[0]), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint holds quantizers of kind {kind}, which {KINDS[kind]} should read, but: {error}. Install"
            " the lightning_quant that wrote it."
        ) from error
    return cast("type[Quantizer]", found).from_signature(signature)


def _name(kind: int) -> str:
    """Name of the class of a kind."""
    if kind not in KINDS:
        raise CheckpointError(
            f"The checkpoint holds quantizers of kind {kind}, which this lightning_quant does not know: load it with"
            f" the lightning_quant that wrote it, or import the module that defines the class with kind={kind} first."
        )
    return KINDS[kind].partition(":")[2]


def check_axis(axis: int | None, ndim: int) -> None:
    """Raise where a tensor of ``ndim`` dimensions has no such axis."""
    if axis is not None and not -ndim <= axis < ndim:
        raise ConfigurationError(f"axis={axis}: the tensor has {ndim} dimensions.")
