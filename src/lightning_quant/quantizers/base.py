"""What all quantizers share: state in FP32, kept with the weights, and checked when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.functional.grid import Grid, check_bits

UNDECIDED = -1
FORMAT_VERSION = 1


class Quantizer(nn.Module):
    """A quantizer of one tensor: a bit-width and buffers that hold its range, NaN until :meth:`initialise`.

    Ranges are buffers and not parameters, so that no optimizer of the user's, no weight decay and no gradient
    clipping finds them. They stay in FP32 when the module is cast to another dtype.

    Args:
        bits: 2..16.

    Raises:
        ConfigurationError: for other bit-widths.
        CheckpointError: when the state of a quantizer of another bit-width is loaded.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.ready = False

    @property
    def grid(self) -> Grid:
        """Smallest and largest code."""
        raise NotImplementedError

    def initialise(self, x: Tensor) -> None:
        """Set the range from the first tensor; leaves the quantizer as it is where ``x`` is all zero."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            device = self._buffers[name].device  # type: ignore[union-attr]
            # On the same device it stays the tensor that an optimizer may hold.
            moved = before if before.device == device else before.detach().to(device)
            self._buffers[name] = moved.requires_grad_(before.requires_grad)
        return self

    def _signature(self) -> list[int]:
        """What must agree before a state can be loaded, as whole numbers; the bit-width comes first."""
        return [self.bits]

    def _restore(self, signature: list[int]) -> None:
        """Takes over what a loaded signature says beyond the bit-width."""

    def get_extra_state(self) -> Tensor:
        """Format version, bit-width and sign as a tensor: users move and clone what a state dict holds as tensors."""
        return torch.tensor([FORMAT_VERSION, *self._signature()])

    def set_extra_state(self, state: Any) -> None:
        """Check version and bit-width of a loaded state against this quantizer's."""
        bits = bits_of_state(state)
        if bits != self.bits:
            raise CheckpointError(
                f"The checkpoint was made with {bits} bits for a tensor that this module quantizes with {self.bits}:"
                f" write {bits} bits for it (weight_bits, activation_bits or gradient_bits), or start from a float"
                " checkpoint."
            )
        self._restore([int(value) for value in state[1:]])

    def unstarted_state(self) -> dict[str, Tensor]:
        """The state of this quantizer before it saw its first tensor."""
        state = self.state_dict()
        return {key: torch.full_like(v, float("nan")) if v.is_floating_point() else v for key, v in state.items()}

    def wake(self) -> None:
        """Notice a range that was copied into the buffers from outside, as averaging of weights does."""
        self.ready = all(not bool(buffer.isnan().any()) for buffer in self._buffers.values() if buffer is not None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.wake()

    def extra_repr(self) -> str:
        """Bits and whether the range is known."""
        return f"bits={self.bits}, ready={self.ready}"


def bits_of_state(state: Tensor) -> int:
    """Bit-width in the extra state of a quantizer.

    Raises:
        CheckpointError: a version of the format that is not known here.
    """
    if int(state[0]) != FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint has version {int(state[0])} of the quantizers' state, this lightning_quant reads version"
            f" {FORMAT_VERSION}: load it with the lightning_quant that wrote it."
        )
    return int(state[1])


def check_axis(axis: int | None, ndim: int) -> None:
    """Raise where a tensor of ``ndim`` dimensions has no such axis."""
    if axis is not None and not -ndim <= axis < ndim:
        raise ConfigurationError(f"axis={axis}: the tensor has {ndim} dimensions.")
