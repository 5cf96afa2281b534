"""Activation quantizer whose range depends on the timestep of a diffusion model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.functional.grid import Grid, fake_quantize, unsigned_grid
from lightning_quant.functional.ranges import mse_search, scale_and_zero_point
from lightning_quant.quantizers.base import Quantizer


class TimestepQuantizer(Quantizer, kind=10):
    """Uniform quantizer with a zero point, and one range for each group of timesteps and each part of the channels.

    The group follows from the timestep with which the network is called (``nn.timesteps`` sets it), never from counting
    calls. Parts serve the concatenation of a skip connection, whose two halves differ in range.

    Args:
        bits: Bit-width, 2 to 16.
        starts: First timestep of each group, in decreasing order, as in sampling. Fewer than two give one group.
        parts: Number of channels (axis 1) of each part; () for a single part.

    Attributes:
        scale: Step sizes of shape (groups, parts), like ``zero_point``.
        group: Index of the group, or one index for each item of the batch.

    Raises:
        ConfigurationError: The starts are not strictly decreasing.

    Example:
        >>> quantizer = TimestepQuantizer(2, starts=(900, 400))
        >>> quantizer.set_range(torch.tensor([[0.0], [0.0]]), torch.tensor([[3.0], [6.0]]))
        >>> [quantizer.at(t)(torch.tensor([4.0])).item() for t in (999, 401, 400, 0)]
        [3.0, 3.0, 4.0, 4.0]
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, starts: Sequence[int] = (), parts: Sequence[int] = ()) -> None:
        super().__init__(bits)
        self.starts, self.parts = tuple(map(int, starts)) or (0,), tuple(map(int, parts))
        if any(a <= b for a, b in zip(self.starts, self.starts[1:], strict=False)):
            raise ConfigurationError(
                f"starts={self.starts}: expected strictly decreasing timesteps, for example (951, 701, 451)."
            )
        self.group: int | Tensor | None = 0 if len(self.starts) == 1 else None
        shape = (len(self.starts), max(len(self.parts), 1))
        self.register_buffer("scale", torch.full(shape, float("nan")))
        self.register_buffer("zero_point", torch.full(shape, float("nan")))
        self._leaves: dict[str, Tensor] | None = None

    @property
    def grid(self) -> Grid:
        """Codes 0 .. 2^b-1."""
        return unsigned_grid(self.bits)

    # -- ranges -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the range with the least squared error on ``x``, the same for all groups."""
        pieces = x.detach().float().split(self.parts, 1) if self.parts else (x.detach().float(),)
        if not all(bool(piece.isfinite().all() & piece.any()) for piece in pieces):
            return
        low, high = (torch.stack(v) for v in zip(*(mse_search(p, self.bits, False) for p in pieces), strict=True))
        self.set_range(low.expand_as(self.scale), high.expand_as(self.scale))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the ranges [low, high], each of shape (groups, parts)."""
        self.scale, zero_point, _ = scale_and_zero_point(low, high, self.bits, symmetric=False)
        assert zero_point is not None
        self.zero_point, self.ready = zero_point, True

    # -- timesteps ----------------------------------------------------------------------------------------------------

    def at(self, timestep: float | Tensor) -> TimestepQuantizer:
        """Select the group of a timestep, or of each item of a batch, and return self."""
        self.group = group_of(self.starts, timestep)
        return self

    @property
    def known_group(self) -> int | Tensor:
        """Index of the group, or one index for each item of the batch.

        Raises:
            QuantizationError: There are several groups, and no timestep is set.
        """
        if self.group is None:
            raise QuantizationError(
                "The ranges depend on the timestep, which is unknown: call the denoiser itself with its timestep, as"
                " diffusers does, network(sample, timestep, ...), or calibrate with activation_parameters='shared'."
            )
        return self.group

    def _chosen(self, values: Tensor, x: Tensor) -> Tensor:
        """Return the values of the current group from a (groups, parts) tensor, broadcastable to ``x``."""
        values = values[self.known_group]
        if self.parts:
            sizes = torch.tensor(self.parts, device=values.device)
            values = values.repeat_interleave(sizes, -1, output_size=sum(self.parts))
        if values.dim() == 1:
            return values[0] if not self.parts else values.view(-1, *[1] * (x.dim() - 2))
        if len(x) % len(values):
            raise QuantizationError(
                f"A tensor has {len(x)} rows, but the network was called with {len(values)} different timesteps: call"
                " it with one timestep for the whole batch."
            )
        values = values.repeat_interleave(len(x) // len(values), 0)
        return values.reshape(len(x), -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else values.reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, keeping its shape and dtype. Acts as the identity until a range is set.

        Raises:
            QuantizationError: There are several groups, and no timestep is set.
        """
        if not self.ready:
            return x
        scale, zero_point = self.scale, self.zero_point
        if self._leaves is not None:
            scale, zero = scale * self._leaves["log_ratio"].exp(), self._leaves["zero_point"]
            zero_point = zero + (self._rounded(zero) - zero).detach()
        return fake_quantize(x, self._chosen(scale, x), self.grid, self._chosen(zero_point, x))

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point of the group of the last timestep.

        Raises:
            QuantizationError: There are several groups, and no timestep is set.
        """
        return self._chosen(self.scale, x), self._chosen(self.zero_point, x)

    def _rounded(self, zero_point: Tensor) -> Tensor:
        return zero_point.detach().round().clamp(self.grid.low, self.grid.high)

    # -- learning -----------------------------------------------------------------------------------------------------

    @property
    def learns(self) -> bool:
        """Whether the quantizer is between :meth:`begin` and :meth:`end`."""
        return self._leaves is not None

    def begin(self) -> dict[str, Tensor]:
        """Start learning, and return the leaf tensors ``log_ratio`` and ``zero_point``, each of shape (groups, parts).

        ``log_ratio`` is the logarithm of the ratio of the scale to its initial value.
        """
        if not self.ready:
            raise QuantizationError("The quantizer has no range yet: call initialize(x) before begin().")
        self._leaves = {
            "log_ratio": torch.zeros_like(self.scale).requires_grad_(),
            "zero_point": self.zero_point.clone().requires_grad_(),
        }
        return self._leaves

    @torch.no_grad()
    def end(self) -> None:
        """Store what was learned. Does nothing if :meth:`begin` was not called."""
        leaves, self._leaves = self._leaves, None
        if leaves is not None:
            self.scale, self.zero_point = self.scale * leaves["log_ratio"].exp(), self._rounded(leaves["zero_point"])

    def cancel(self) -> None:
        """Discard what was learned."""
        self._leaves = None

    # -- state --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_signature(cls, signature: list[int]) -> TimestepQuantizer:
        bits, groups, *rest = signature
        return cls(bits, rest[:groups], rest[groups:])

    def _signature(self) -> list[int]:
        return [self.bits, len(self.starts), *self.starts, *self.parts]

    def _restore(self, signature: list[int]) -> None:
        other = self.from_signature(signature)
        self.starts, self.parts, self.group = other.starts, other.parts, other.group


def group_of(starts: Sequence[int], timestep: float | Tensor) -> int | Tensor:
    """Return the group of a timestep: group g is ``starts[g] >= t > starts[g + 1]``, and the first has no upper end.

    The result is a tensor if the timesteps of a tensor are in different groups. It is also a tensor on an accelerator,
    to avoid a synchronization, and in a compiled network, which is one graph for all groups.

    Example:
        >>> group_of((900, 400), 400), group_of((900, 400), torch.tensor([950, 3]))
        (1, tensor([0, 1]))
    """
    if len(starts) == 1:
        return 0
    if not isinstance(timestep, Tensor):
        return sum(timestep <= start for start in starts[1:])
    later = torch.tensor(starts[1:], device=timestep.device)
    index = (timestep.reshape(-1, 1) <= later).sum(1)
    waits = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if waits and bool((index == index[0]).all()):
        return int(index[0])
    return index[0] if len(index) == 1 else index
