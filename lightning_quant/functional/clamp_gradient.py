"""Backward pass of a quantized tensor: the clamp mask, the gradient of the range, and the codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.functional.blocks import blocks, dense, like
from lightning_quant.functional.compression import codes_of, unpack
from lightning_quant.functional.grid import Grid, clamp_bounds, round_to_grid


class QuantizedBackward(NamedTuple):
    """Results of :func:`quantized_backward`.

    Attributes:
        grad: Gradient of x: 0 where the clamp acts.
        inner: Sum of ``grad * x``, 0-dim FP32.
        codes: Integer codes of x, FP32.
    """

    grad: Tensor
    inner: Tensor
    codes: Tensor


def quantized_backward(
    grad: Tensor, kept: Tensor, scale: Tensor, grid: Grid, packed: bool, factor: Tensor | None = None
) -> QuantizedBackward:
    """Compute in one pass all that the backward pass of a quantized tensor needs.

    Args:
        grad: Gradient of the quantized tensor, any shape. Overwritten where that saves a copy.
        kept: Tensor x itself, or its packed form from ``compression.pack``.
        scale: Step size of x, 0-dim.
        grid: Smallest and largest code of x.
        packed: Whether ``kept`` is packed.
        factor: Factor by which ``grad`` is multiplied first, 0-dim.

    Example:
        >>> x, grad = torch.tensor([-1.0, 0.4, 1.0, 9.0]), torch.ones(4)
        >>> result = quantized_backward(grad, x, torch.tensor(0.5), Grid(0, 3), packed=False)
        >>> result.grad.tolist(), float(result.inner), result.codes.tolist()
        ([0.0, 1.0, 1.0, 0.0], 1.399999976158142, [0.0, 1.0, 2.0, 3.0])
    """
    kept = dense(kept)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = like(grad.to(wide), kept)
    codes = torch.empty_like(kept, dtype=wide)
    low, high = clamp_bounds(grid)
    inner: Tensor | None = None
    for g, k, c in blocks(grad, kept, codes):
        positions = unpack(k, grid).to(wide) if packed else torch.div(k.to(wide), scale, out=c)
        if factor is not None:
            g.mul_(factor)
        torch.ops.aten.hardtanh_backward.grad_input(g, positions, low, high, grad_input=g)
        part = torch.dot(g, positions)
        inner = part if inner is None else inner + part
        if packed:
            c.copy_(codes_of(k, grid))
        else:
            round_to_grid(c, grid)
    assert inner is not None
    return QuantizedBackward(grad, inner * scale, codes)
