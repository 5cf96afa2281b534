"""Products of a layer, forward and backward, on tensors that may hold integer codes.

A product is bilinear in its input and its weight, so codes can be multiplied first and the two scales applied to the
result. Sums below 2^24 are exact in FP32, in any order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LinearProduct:
    """``y = x w^T`` for x (..., in), w (out, in), y (..., out).

    ``channel_axis`` is the axis of the output's channels.

    Example:
        >>> LinearProduct()(torch.ones(2, 3), torch.ones(4, 3)).shape
        torch.Size([2, 4])
    """

    channel_axis: ClassVar[int] = -1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the output without bias."""
        if x.numel() != x.shape[-1]:
            return F.linear(x, weight)
        # A single row is dispatched to another kernel, which rounds differently from the same row in a batch.
        pair = F.linear(x.reshape(1, -1).expand(2, -1), weight)
        return pair[0].view(*x.shape[:-1], -1)

    def input_gradient(self, grad: Tensor, weight: Tensor, x_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the input, shape ``x_shape``."""
        return (grad.reshape(-1, grad.shape[-1]) @ weight).view(x_shape)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the weight."""
        return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


# eq=False keeps the default hash: the compiler of PyTorch 2.6 asks for the hash before the fields are set.
@dataclass(frozen=True, eq=False)
class ConvolutionProduct:
    """Convolution or transposed convolution in 1, 2 or 3 dimensions, with the arguments of ``torch.convolution``.

    Example:
        >>> product = ConvolutionProduct((2, 2), (1, 1), (1, 1))
        >>> product(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3)).shape
        torch.Size([1, 4, 4, 4])
    """

    channel_axis: ClassVar[int] = 1

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)
    groups: int = 1

    def _arguments(self) -> tuple[object, ...]:
        return (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the output without bias."""
        return torch.ops.aten.convolution(x, weight, None, *self._arguments())  # type: ignore[no-any-return]

    def input_gradient(self, grad: Tensor, weight: Tensor, x_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the input, shape ``x_shape``."""
        x = grad.new_empty(()).expand(x_shape)
        return self._backward(grad, x, weight, [True, False, False])[0]

    def weight_gradient(self, grad: Tensor, x: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Compute the gradient of the weight, shape ``weight_shape``."""
        weight = grad.new_empty(()).expand(weight_shape)
        return self._backward(grad, x, weight, [False, True, False])[1]

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            grad, x, weight, None, *self._arguments(), mask
        )


Product = LinearProduct | ConvolutionProduct
