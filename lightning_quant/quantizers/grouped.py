"""Group quantizers: a few fixed ranges, among which the channels or rows of each image are distributed anew."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.grid import Grid, unsigned_grid
from lightning_quant.functional.groups import (
    affine_parameters,
    channel_groups,
    quantize_channels,
    quantize_rows,
    row_groups,
)
from lightning_quant.quantizers.base import Quantizer


class InstanceQuantizer(Quantizer):
    """Base class of quantizers that treat each image on its own.

    Attributes:
        instances: Number of images in a batch; None means the size of the first dimension. Windowed attention sets it,
            since it folds the windows of an image into the first dimension, one after the other.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.instances: int | None = None

    @property
    def grid(self) -> Grid:
        """Codes 0 .. 2^b-1."""
        return unsigned_grid(self.bits)

    def per_image(self, x: Tensor) -> Tensor:
        """Reshape (images, ..., channels) to (images, tokens, channels)."""
        images = self.instances or x.shape[0]
        if x.dim() < 3 or x.shape[0] % images:
            raise ConfigurationError(
                f"{type(self).__name__} expects (images, tokens, channels), but found {tuple(x.shape)} for {images}"
                " images: use a FixedQuantizer for a layer whose input has one token per image."
            )
        return x.reshape(images, -1, x.shape[-1])


class GroupQuantizer(InstanceQuantizer, kind=4):
    """Group quantizer of channels: in each image a channel uses the group whose center is nearest to its (min, max).

    Source: arXiv 2404.00928, section 3.2. The centers decide the assignment, the ranges (which may be wider) the grid.

    Args:
        bits: Bit-width, 2 to 16.
        groups: Number of groups.

    Shape:
        (images, ..., channels), or (images x windows, tokens, channels) with ``instances`` set.

    Example:
        >>> quantizer = GroupQuantizer(2, 2)
        >>> quantizer.set_ranges(torch.tensor([[0.0, 3.0], [-10.0, 20.0]]))
        >>> quantizer(torch.tensor([[[0.0, -10.0], [1.1, 20.0]]])).tolist()
        [[[0.0, -10.0], [1.0, 20.0]]]
    """

    centres: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, groups: int) -> None:
        super().__init__(bits)
        self.groups = groups
        self.register_buffer("centres", torch.full((groups, 2), float("nan"), dtype=torch.float32))
        self.register_buffer("scale", torch.full((groups,), float("nan"), dtype=torch.float32))
        self.register_buffer("zero_point", torch.full((groups,), float("nan"), dtype=torch.float32))

    def set_ranges(self, centres: Tensor, ranges: Tensor | None = None, clip_zero_point: bool = False) -> None:
        """Set centers and ranges, each of shape (groups, 2). Without ranges the centers are the ranges.

        Args:
            centres: Lower and upper bound with which the range of a channel is compared.
            ranges: Lower and upper bound of the codes.
            clip_zero_point: Whether to clip the zero point to the codes, see
                :func:`lightning_quant.functional.groups.affine_parameters`.
        """
        low, high = (centres if ranges is None else ranges).to(self.scale).unbind(dim=1)
        self.scale, self.zero_point = affine_parameters(low, high, self.bits, clip_zero_point)
        self.centres = centres.to(self.scale)
        self.groups = len(centres)
        self.ready = True

    def refresh_ready(self) -> None:
        """Update ``ready``. Groups without channels (NaN in older states) take their center as their range."""
        scale, zero_point = affine_parameters(self.centres[:, 0], self.centres[:, 1], self.bits)
        empty = self.scale.isnan()
        self.scale, self.zero_point = scale.where(empty, self.scale), zero_point.where(empty, self.zero_point)
        super().refresh_ready()

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, keeping its shape and dtype. Acts as the identity until the ranges are set."""
        if not self.ready or x.numel() == 0:
            return x
        tokens = self.per_image(x)
        return quantize_channels(tokens, self.centres, self.scale, self.zero_point, self.bits).view(x.shape)

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point of the group of each channel of each image."""
        tokens = self.per_image(x)
        group = channel_groups(tokens, self.centres)
        scale, zero_point = (value[group].expand_as(tokens).reshape(x.shape) for value in (self.scale, self.zero_point))
        return scale, zero_point

    @classmethod
    def from_signature(cls, signature: list[int]) -> GroupQuantizer:
        return cls(signature[0], signature[1])

    def _signature(self) -> list[int]:
        return [self.bits, self.groups]

    def _restore(self, signature: list[int]) -> None:
        self.groups = signature[1]


class RowGroupQuantizer(InstanceQuantizer, kind=5):
    """Group quantizer of softmax rows: a row uses the range [0, u] of the group whose center is nearest to its maximum.

    Source: arXiv 2404.00928, section 3.2.

    Args:
        bits: Bit-width, 2 to 16.
        groups: Number of groups.

    Shape:
        (..., rows, keys).

    Example:
        >>> quantizer = RowGroupQuantizer(2, 2)
        >>> quantizer.set_ranges(torch.tensor([0.6, 0.9]))
        >>> quantizer(torch.tensor([[0.9, 0.1], [0.4, 0.6]]))
        tensor([[0.9000, 0.0000],
                [0.4000, 0.6000]])
    """

    centres: Tensor
    scale: Tensor

    def __init__(self, bits: int, groups: int) -> None:
        super().__init__(bits)
        self.groups = groups
        self.register_buffer("centres", torch.full((groups,), float("nan"), dtype=torch.float32))
        self.register_buffer("scale", torch.full((groups,), float("nan"), dtype=torch.float32))

    def set_ranges(self, centres: Tensor, ranges: Tensor | None = None) -> None:
        """Set centers and upper bounds, each of shape (groups,). Without bounds the centers are the bounds."""
        high = (centres if ranges is None else ranges).to(self.scale)
        self.scale, _ = affine_parameters(torch.zeros_like(high), high, self.bits)
        self.centres = centres.to(self.scale)
        self.groups = len(centres)
        self.ready = True

    def refresh_ready(self) -> None:
        """Update ``ready``. Groups without rows (NaN in older states) take their center as their range."""
        scale, _ = affine_parameters(torch.zeros_like(self.centres), self.centres, self.bits)
        self.scale = scale.where(self.scale.isnan(), self.scale)
        super().refresh_ready()

    def forward(self, attention: Tensor) -> Tensor:
        """Quantize ``attention``, keeping its shape and dtype. Acts as the identity until the ranges are set."""
        return quantize_rows(attention, self.centres, self.scale, self.bits) if self.ready else attention

    def affine_of(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the scale of the group of each row, and no zero point."""
        return self.scale[row_groups(x, self.centres)], None

    @classmethod
    def from_signature(cls, signature: list[int]) -> RowGroupQuantizer:
        return cls(signature[0], signature[1])

    def _signature(self) -> list[int]:
        return [self.bits, self.groups]

    def _restore(self, signature: list[int]) -> None:
        self.groups = signature[1]
