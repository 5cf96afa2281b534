"""Factors of a product as codes and scales, and where the scales are applied.

Codes of up to 8 bits are exact in BF16 and FP16, real values are not. So in low precision the codes are multiplied and
the result is scaled. In FP32 the scales are multiplied into the smaller factor, the weight, which saves a pass over the
result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.functional.grid import Grid
from lightning_quant.functional.integer_products import INTEGER_PRODUCTS
from lightning_quant.functional.products import Product


class Codes(NamedTuple):
    """Tensor as ``values * scale``: integer codes and their step size, or real values and None."""

    values: Tensor
    scale: Tensor | None = None
    grid: Grid | None = None


def joint(scales: Sequence[Tensor | None]) -> Tensor | None:
    """Multiply the scales that are not None. Returns None if there are none."""
    factors = [scale for scale in scales if scale is not None]
    return math.prod(factors[1:], start=factors[0]) if factors else None


def scaled(result: Tensor, *scales: Tensor | None) -> Tensor:
    """Scale ``result`` in place."""
    factor = joint(scales)
    return result if factor is None else result.mul_(factor)


def _headroom(a: Codes, b: Codes, terms: int, dtype: torch.dtype) -> float:
    """Return the power of two that keeps sums of products of codes within FP16, whose largest number is 65,504."""
    if dtype != torch.float16 or a.grid is None or b.grid is None:
        return 1.0
    bound = max(map(abs, a.grid)) * max(map(abs, b.grid)) * terms
    return 2.0 ** -max(0, bound.bit_length() - 15)


def operands(a: Codes, b: Codes, terms: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the two factors in ``dtype``, and the scales to apply to their product."""
    if dtype == torch.float16 and (a.grid is None or b.grid is None):
        # Sums of codes times real values are unbounded, so multiply real values as autocast does.
        a, b = (Codes(real(c)) for c in (a, b))
    room = _headroom(a, b, terms, dtype)
    if room == 1.0:
        return a.values.to(dtype), b.values.to(dtype), [a.scale, b.scale]
    assert a.scale is not None
    return (a.values * room).to(dtype), b.values.to(dtype), [a.scale / room, b.scale]


def with_weight(
    weight: Codes, other: Codes, fan: int, dtype: torch.dtype, product: Product
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the same as :func:`operands`, with the scales multiplied into the weight if that does not round it."""
    if dtype.itemsize < 4 or isinstance(product, INTEGER_PRODUCTS):
        return operands(weight, other, fan, dtype)
    factor = joint([weight.scale, other.scale])
    values = weight.values if factor is None else weight.values * factor
    return values.to(dtype), other.values.to(dtype), []


def real(codes: Codes) -> Tensor:
    """Compute the real values of codes."""
    return codes.values if codes.scale is None else codes.values * codes.scale


def fan(weight: Tensor) -> int:
    """Return an upper bound on the number of products in one element of the output or of the input gradient."""
    return weight.numel() // min(weight.shape[:2])


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Compute the sum of a * b in FP32, without a copy if both have the same memory layout."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1).float(), b.view(-1).float())
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return torch.dot(*(t.permute(order).reshape(-1).float() for t in (a, b)))


def shortest(codes: Tensor, grid: Grid) -> Tensor:
    """Convert the codes to the shortest integer dtype that holds them."""
    for dtype in (torch.int8, torch.uint8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= grid.low and grid.high <= limits.max:
            return codes.to(dtype)
    return codes.to(torch.int32)
