"""Grouped quantization against a slow FP64 loop, and what must not matter: batches, order, signs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.functional.groups import (
    affine_parameters,
    assign,
    channel_ranges,
    quantize_affine,
    quantize_channels,
    quantize_rows,
)


def slow_code(x: float, low: float, high: float, bits: int) -> float:
    """The value that a number is moved to, in FP64, from the paper's formula."""
    top = 2**bits - 1
    scale = max((high - low) / top, 1e-8)
    zero = round(-low / scale)
    return float(scale * (min(max(round(x / scale) + zero, 0), top) - zero))


def slow_channels(x: Tensor, centres: Tensor, bits: int) -> Tensor:
    out = torch.empty_like(x, dtype=torch.float64)
    for image in range(x.shape[0]):
        for channel in range(x.shape[2]):
            column = [float(v) for v in x[image, :, channel]]
            distances = [(min(column) - float(low)) ** 2 + (max(column) - float(high)) ** 2 for low, high in centres]
            low, high = map(float, centres[distances.index(min(distances))])
            out[image, :, channel] = torch.tensor([slow_code(v, low, high, bits) for v in column])
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_channels_are_those_of_the_slow_loop(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 7, 12, generator=generator) * torch.rand(12, generator=generator) * 5 + 1
    centres = torch.tensor([[-1.0, 2.0], [0.25, 1.75], [-6.0, 8.0]])
    parameters = affine_parameters(centres[:, 0], centres[:, 1], bits)
    found = quantize_channels(x, centres, *parameters, bits)
    slow = slow_channels(x, centres, bits)
    # FP32 and FP64 may round a value in the middle of two codes differently.
    step = parameters[0].max() * 1.001
    apart = (found - slow).abs()
    assert (apart > 1e-5).float().mean() < 0.01
    assert apart.max() <= step


def test_rows_are_those_of_the_slow_loop() -> None:
    attention = torch.randn(2, 3, 5, 9, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    centres = torch.tensor([0.2, 0.5, 0.9])
    scale, _ = affine_parameters(torch.zeros(3), centres, 4)
    found = quantize_rows(attention, centres, scale, 4)
    for row, moved in zip(attention.flatten(0, 2), found.flatten(0, 2), strict=True):
        nearest = min(map(float, centres), key=lambda centre: abs(float(row.max()) - centre))
        slow = torch.tensor([slow_code(float(v), 0.0, nearest, 4) for v in row], dtype=torch.float64)
        assert torch.allclose(moved.double(), slow, atol=1e-6)


def test_assignment_takes_the_first_of_equally_near_centres() -> None:
    assert assign(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == 0


@given(
    st.floats(-100, 100, width=32), st.floats(0.0078125, 100, width=32), st.integers(2, 8), st.floats(0, 1, width=32)
)
@settings(max_examples=200, deadline=None)
def test_a_range_of_any_sign_is_covered(low: float, width: float, bits: int, share: float) -> None:
    high = low + width
    x = torch.tensor(low + share * width)
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), bits)
    # Half a step by rounding, and half for the zero point that rounding moves the range by.
    assert abs(float(quantize_affine(x, scale, zero_point, bits)) - float(x)) <= float(scale) * 1.01 + 1e-4 * abs(low)


def test_the_literal_zero_point_loses_a_range_of_one_sign() -> None:
    low, high, x = torch.tensor(2.0), torch.tensor(3.0), torch.tensor([2.0, 2.5, 3.0])
    kept = quantize_affine(x, *affine_parameters(low, high, 4), 4)
    literal = quantize_affine(x, *affine_parameters(low, high, 4, clip_zero_point=True), 4)
    assert torch.allclose(kept, x, atol=0.05)
    assert literal.max() <= 1.0 + 1e-6


def test_moving_the_input_and_all_ranges_moves_the_output() -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    centres = torch.tensor([[-1.0, 1.0], [-3.0, 2.0]])
    scale, zero_point = affine_parameters(centres[:, 0], centres[:, 1], 4)
    mirrored = -centres.flip(1)
    negated = quantize_channels(-x, mirrored, *affine_parameters(mirrored[:, 0], mirrored[:, 1], 4), 4)
    assert torch.allclose(negated, -quantize_channels(x, centres, scale, zero_point, 4), atol=float(scale.max()) * 1.01)


def test_images_do_not_know_each_other() -> None:
    x = torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 17) / 4
    centres = torch.tensor([[-1.0, 1.0], [-3.0, 3.0], [-8.0, 8.0]])
    parameters = affine_parameters(centres[:, 0], centres[:, 1], 4)
    whole = quantize_channels(x, centres, *parameters, 4)
    each = torch.cat([quantize_channels(x[i : i + 1], centres, *parameters, 4) for i in range(5)])
    assert torch.equal(whole, each)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(quantize_channels(x[order], centres, *parameters, 4), whole[order])


def test_ranges_are_of_the_tokens_of_an_image() -> None:
    ranges = channel_ranges(torch.tensor([[[1.0], [3.0]], [[-5.0], [math.pi]]]))
    assert torch.allclose(ranges, torch.tensor([[[1.0, 3.0]], [[-5.0, math.pi]]]))


def test_quantizing_twice_changes_nothing() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(3))
    parameters = affine_parameters(torch.tensor(0.3), torch.tensor(1.4), 4)
    once = quantize_affine(x, *parameters, 4)
    assert torch.equal(quantize_affine(once, *parameters, 4), once)
