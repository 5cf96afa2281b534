"""Dynamic quantizers: the range of each token, or of each channel of each image, is computed in the forward pass.

They cost integer hardware more than fixed ranges. They serve as baselines and as the upper bound of grouping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.functional.groups import affine_parameters, quantize_affine
from lightning_quant.quantizers.grouped import InstanceQuantizer


class TokenQuantizer(InstanceQuantizer, kind=6):
    """Dynamic quantizer per token, or per row of a softmax, from the minimum to the maximum of the last axis.

    Args:
        bits: Bit-width, 2 to 16.
        from_zero: Whether the range starts at 0, as for a softmax.

    Shape:
        (..., channels).

    Example:
        >>> TokenQuantizer(2)(torch.tensor([[0.0, 1.1, 3.0], [0.0, 0.4, 0.3]]))
        tensor([[0.0000, 1.0000, 3.0000],
                [0.0000, 0.4000, 0.2667]])
    """

    def __init__(self, bits: int, from_zero: bool = False) -> None:
        super().__init__(bits)
        self.from_zero = from_zero
        self.ready = True

    @classmethod
    def from_signature(cls, signature: list[int]) -> TokenQuantizer:
        return cls(signature[0], bool(signature[1]))

    def _signature(self) -> list[int]:
        return [self.bits, int(self.from_zero)]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, keeping its shape and dtype."""
        return quantize_affine(x, *self.affine_of(x), self.bits)

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point of each token."""
        low, high = x.float().aminmax(dim=-1, keepdim=True)
        return affine_parameters(torch.zeros_like(low) if self.from_zero else low, high, self.bits)


class ChannelQuantizer(InstanceQuantizer, kind=7):
    """Dynamic quantizer per channel of each image: the upper bound of grouping.

    Args:
        bits: Bit-width, 2 to 16.

    Shape:
        (images, ..., channels), or (images x windows, tokens, channels) with ``instances`` set.

    Example:
        >>> ChannelQuantizer(2)(torch.tensor([[[0.0, -3.0], [0.9, -0.9], [3.0, 0.0]]])).tolist()
        [[[0.0, -3.0], [1.0, -1.0], [3.0, 0.0]]]
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.ready = True

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, keeping its shape and dtype."""
        if x.numel() == 0:
            return x
        tokens = self.per_image(x)
        return quantize_affine(tokens, *self._of_tokens(tokens), self.bits).view(x.shape)

    def _of_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, each of shape (images, 1, channels)."""
        low, high = tokens.float().amin(dim=1, keepdim=True), tokens.float().amax(dim=1, keepdim=True)
        return affine_parameters(low, high, self.bits)

    def affine_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point of each channel of each image."""
        tokens = self.per_image(x)
        scale, zero_point = self._of_tokens(tokens)
        return scale.expand_as(tokens).reshape(x.shape), zero_point.expand_as(tokens).reshape(x.shape)


class LogQuantizer(InstanceQuantizer, kind=9):
    """Logarithmic quantizer of a softmax, with base sqrt(2): values ``s 2^(-code / 2)``, and the last code is 0.

    Source: Li et al., "RepQ-ViT", ICCV 2023 (arXiv 2212.08254), section 3.3.

    Args:
        bits: Bit-width, 2 to 16.

    Shape:
        Any shape, non-negative values.

    Example:
        >>> quantizer = LogQuantizer(3)
        >>> quantizer.scale, quantizer.ready = torch.tensor(1.0), True
        >>> quantizer(torch.tensor([1.0, 0.26, 0.001]))
        tensor([1.0000, 0.2500, 0.0000])
    """

    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("scale", torch.tensor(float("nan"), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``, keeping its shape and dtype. Acts as the identity until a scale is set."""
        if not self.ready:
            return x
        codes = (-2 * torch.log2(x.float() / self.scale)).round_().clamp_min_(0)
        values = self.scale * torch.exp2(-codes / 2)
        return values.masked_fill_(codes >= self.grid.high, 0.0).to(x.dtype)
