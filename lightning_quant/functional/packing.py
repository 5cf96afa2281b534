"""Packing of 2- to 16-bit codes into bytes without gaps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.blocks import BLOCK
from lightning_quant.functional.grid import check_bits


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that ``count`` codes take: ``ceil(count * bits / 8)``.

    Example:
        >>> packed_size(4, 6)
        3
    """
    return math.ceil(count * check_bits(bits) / 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes: code i takes bits ``i * bits .. (i + 1) * bits - 1``, the low bits of a byte first.

    Args:
        codes: Whole numbers 0 .. 2^bits - 1 of any dtype and shape, packed in row-major order.
        bits: Bit-width, 2 to 16.

    Returns:
        Bytes, uint8, shape (ceil(count * bits / 8),), on the device of ``codes``.

    Raises:
        ConfigurationError: A code does not fit into ``bits``.

    Example:
        >>> [f"{byte:08b}" for byte in pack_bits(torch.tensor([1, 2, 15]), 4).tolist()]
        ['00100001', '00001111']
    """
    flat = codes.reshape(-1)
    packed = torch.empty(packed_size(len(flat), bits), dtype=torch.uint8, device=codes.device)
    for start in range(0, len(flat), BLOCK):
        part = _checked(flat[start : start + BLOCK], bits)
        eights = F.pad(part, (0, -len(part) % 8)).view(-1, 8)
        columns = eights.new_zeros(len(eights), bits)
        for code, byte, shift in _overlaps(bits):
            columns[:, byte] |= _shifted(eights[:, code], shift)
        target = packed[start * bits // 8 :][: packed_size(len(part), bits)]
        # The conversion to uint8 keeps the low byte of each number.
        target.copy_(columns.bitwise_and_(255).view(-1)[: len(target)])
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the codes of :func:`pack_bits`: int32, shape (count,).

    Args:
        packed: One-dimensional tensor, uint8.
        bits: Bit-width of a code.
        count: Number of codes.

    Raises:
        ConfigurationError: The number of bytes does not match the number of codes.

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([5, 0, 63]), 6), 6, 3).tolist()
        [5, 0, 63]
    """
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise ConfigurationError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes (uint8), but found {packed.dtype} of"
            f" shape {tuple(packed.shape)}."
        )
    codes = torch.empty(count, dtype=torch.int32, device=packed.device)
    for start in range(0, count, BLOCK):
        target = codes[start : start + BLOCK]
        part = packed[start * bits // 8 :][: packed_size(len(target), bits)].to(torch.int32)
        columns = F.pad(part, (0, -len(part) % bits)).view(-1, bits)
        eights = columns.new_zeros(len(columns), 8)
        for code, byte, shift in _overlaps(bits):
            eights[:, code] |= _shifted(columns[:, byte], -shift)
        target.copy_(eights.bitwise_and_(2**bits - 1).view(-1)[: len(target)])
    return codes


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Iterate over eight codes in ``bits`` bytes: a code, a byte that overlaps it, and the code's first bit in it."""
    for code in range(8):
        start, end = code * bits, (code + 1) * bits
        for byte in range(start // 8, math.ceil(end / 8)):
            yield code, byte, start - 8 * byte


def _shifted(x: Tensor, shift: int) -> Tensor:
    return x << shift if shift >= 0 else x >> -shift


def _checked(codes: Tensor, bits: int) -> Tensor:
    whole = codes.to(torch.int32)
    low, high = (int(value) for value in whole.aminmax())
    if low < 0 or high >= 2**bits or not torch.equal(whole.to(codes.dtype), codes):
        raise ConfigurationError(
            f"Codes from {low} to {high}: expected whole numbers from 0 to {2**bits - 1}, the range of {bits} bits."
        )
    return whole
