"""The method in FP64, written as slowly and as near to the paper as possible: what the package is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Round(torch.autograd.Function):
    """Half to even, straight-through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_through(x: Tensor) -> Tensor:
    """Rounded, with the gradient of the identity."""
    rounded: Tensor = _Round.apply(x)
    return rounded


def quantize_weight(weight: Tensor, s: Tensor, bits: int) -> Tensor:
    """t = clamp((W/s + 1)/2, 0, 1); Q = s (2 round(n t)/n - 1) with n = 2^b - 2, by autograd."""
    n, s = 2.0**bits - 2, s.abs()
    t = ((weight / s + 1) / 2).clamp(0, 1)
    return s * (2 * round_through(n * t) / n - 1)


def quantize_unsigned(x: Tensor, u: Tensor, bits: int) -> Tensor:
    """Q = u round(n clamp(X/u, 0, 1))/n with n = 2^b - 1, by autograd."""
    n, u = 2.0**bits - 1, u.abs()
    return u * round_through(n * (x / u).clamp(0, 1)) / n


def quantize_gradient(gradient: Tensor, gamma: float, bits: int, noise: Tensor) -> Tensor:
    """c = gamma max|G|; d = 2c/(2^b-2); q = round(clamp((G+c)/d + U, 0, 2^b-2)); q d - c."""
    c = gamma * gradient.abs().max()
    d = 2 * c / (2.0**bits - 2)
    q = torch.round(((gradient + c) / d + noise).clamp(0, 2.0**bits - 2))
    return q * d - c


class _QuantizedGradient(torch.autograd.Function):
    """Identity whose gradient is replaced by a fixed one, that of the quantizer."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, quantized: Tensor) -> Tensor:
        ctx.save_for_backward(quantized)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def with_gradient(y: Tensor, quantized: Tensor) -> Tensor:
    """``y``, whose gradient will be ``quantized``."""
    result: Tensor = _QuantizedGradient.apply(y, quantized)
    return result
