"""Quantizers whose few ranges are fixed, and whose channels or rows choose among them anew for each image."""

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
    """A quantizer that looks at each image by itself.

    Attributes:
        instances: how many images a batch holds; None where it is the first dimension. Windowed attention sets it,
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
        """View or copy of (images, ..., channels) as (images, tokens, channels)."""
        images = self.instances or x.shape[0]
        if x.dim() < 3 or x.shape[0] % images:
            raise ConfigurationError(
                f"{type(self).__name__} needs (images, tokens, channels), found {tuple(x.shape)} of {images} images:"
                " a layer whose input has one token an image takes a FixedQuantizer."
            )
        return x.reshape(images, -1, x.shape[-1])


class GroupQuantizer(InstanceQuantizer, kind=4):
    """Per image, each channel takes the quantizer of the group whose centre is nearest to its (min, max).

    Source: arXiv 2404.00928, section 3.2. The centres decide the assignment; the ranges, which may be wider, the grid.

    Args:
        bits: 2..16.
        groups: how many quantizers.

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
        """Take over centres and ranges, (groups, 2) each; without ranges the centres are the ranges.

        Args:
            centres: lower and upper bound that a channel's range is compared to.
            ranges: lower and upper bound of the codes.
            clip_zero_point: see :func:`lightning_quant.functional.groups.affine_parameters`.
        """
        low, high = (centres if ranges is None else ranges).to(self.scale).unbind(dim=1)
        self.scale, self.zero_point = affine_parameters(low, high, self.bits, clip_zero_point)
        self.centres = centres.to(self.scale)
        self.groups = len(centres)
        self.ready = True

    def refresh_ready(self) -> None:
        """As the parent's; groups that no channel fell in, NaN in older states, take their centre as range."""
        scale, zero_point = affine_parameters(self.centres[:, 0], self.centres[:, 1], self.bits)
        empty = self.scale.isnan()
        self.scale, self.zero_point = scale.where(empty, self.scale), zero_point.where(empty, self.zero_point)
        super().refresh_ready()

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grids, in the shape and dtype of ``x``; the identity before :meth:`set_ranges`."""
        if not self.ready or x.numel() == 0:
            return x
        tokens = self.per_image(x)
        return quantize_channels(tokens, self.centres, self.scale, self.zero_point, self.bits).view(x.shape)

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the group that each channel of each image takes."""
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
    """Each row of a softmax takes the quantizer [0, u] of the group whose centre is nearest to its maximum.

    Source: arXiv 2404.00928, section 3.2.

    Args:
        bits: 2..16.
        groups: how many quantizers.

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
        """Take over centres and upper bounds, (groups,) each; without bounds the centres are the bounds."""
        high = (centres if ranges is None else ranges).to(self.scale)
        self.scale, _ = affine_parameters(torch.zeros_like(high), high, self.bits)
        self.centres = centres.to(self.scale)
        self.groups = len(centres)
        self.ready = True

    def refresh_ready(self) -> None:
        """As the parent's; groups that no row fell in, NaN in older states, take their centre as range."""
        scale, _ = affine_parameters(torch.zeros_like(self.centres), self.centres, self.bits)
        self.scale = scale.where(self.scale.isnan(), self.scale)
        super().refresh_ready()

    def forward(self, attention: Tensor) -> Tensor:
        """Values on the grids, in the shape and dtype of ``attention``; the identity before :meth:`set_ranges`."""
        return quantize_rows(attention, self.centres, self.scale, self.bits) if self.ready else attention

    def affine_of(self, x: Tensor) -> tuple[Tensor, None]:
        """Of the group that each row takes."""
        return self.scale[row_groups(x, self.centres)], None

    @classmethod
    def from_signature(cls, signature: list[int]) -> RowGroupQuantizer:
        return cls(signature[0], signature[1])

    def _signature(self) -> list[int]:
        return [self.bits, self.groups]

    def _restore(self, signature: list[int]) -> None:
        self.groups = signature[1]
