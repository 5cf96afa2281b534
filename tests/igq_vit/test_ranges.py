"""Fitted ranges against slow searches in FP64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.functional.groups import affine_parameters, assign, channel_ranges, quantize_affine
from lightning_quant.igq_vit.ranges import (
    EXTENSIONS,
    fit_channel_groups,
    fit_row_groups,
    gram_matrix,
    layer_wise_range,
    tail_bounds,
    thinned,
    weight_range,
)


def slow_quantize(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    scale = max((high - low) / (2**bits - 1), 1e-8)
    zero = round(-low / scale)
    values: Tensor = scale * ((torch.round(x.double() / scale) + zero).clamp(0, 2**bits - 1) - zero)
    return values


def activations(images: int = 4, tokens: int = 12, channels: int = 24, seed: int = 0) -> Tensor:
    """Channels of very different widths and offsets."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.randn(channels, generator=generator).exp()
    offset = torch.randn(channels, generator=generator)
    return torch.randn(images, tokens, channels, generator=generator) * width + offset


@given(st.integers(1, 400), st.lists(st.floats(0, 45), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_tail_bounds_are_those_of_the_sorted_values(count: int, tails: list[float], seed: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    ordered = sorted(x.tolist())
    for tail, (low, high) in zip(tails, tail_bounds(x, tails).tolist(), strict=True):
        cut = int(count * tail / 100)
        assert low == ordered[cut]
        assert high == ordered[count - 1 - cut]


@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("bits", [3, 6])
def test_the_layer_wise_range_has_the_least_error_of_all_tails(bits: int, power: int) -> None:
    x, tails = torch.randn(6, 500, generator=torch.Generator().manual_seed(1)).pow(3), (0.0, 0.5, 2.0, 5.0)
    low, high = layer_wise_range(x, bits, tails, power=power)
    errors = {}
    for bounds in tail_bounds(x, tails).tolist():
        errors[tuple(bounds)] = float((slow_quantize(x, bounds[0], bounds[1], bits) - x).abs().pow(power).sum())
    assert (float(low), float(high)) == min(errors, key=lambda bounds: errors[bounds])


def test_the_cube_clips_less_than_the_square() -> None:
    x, tails = torch.randn(6, 2000, generator=torch.Generator().manual_seed(1)).pow(3), (0.0, 0.1, 0.5, 2.0, 5.0)
    widths = [float(high - low) for low, high in (layer_wise_range(x, 4, tails, power=power) for power in (2, 3))]
    assert widths[0] < widths[1]


@pytest.mark.parametrize("bits", [3, 4])
def test_weight_ranges_have_the_least_error_of_the_outputs(bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x, tails = torch.randn(5, 40, generator=generator).pow(3), activations(3, 10, 40), (0.0, 1.0, 5.0, 20.0)
    low, high = weight_range(weight, gram_matrix(x), bits, tails)
    for row, found in zip(weight, zip(low.tolist(), high.tolist(), strict=True), strict=True):
        errors = {}
        for tail in tails:
            bounds = [float(torch.quantile(row, share)) for share in (tail / 100, 1 - tail / 100)]
            outputs = x.double() @ (slow_quantize(row, bounds[0], bounds[1], bits) - row.double())
            errors[tuple(bounds)] = float(outputs.square().sum())
        best = min(errors, key=lambda bounds: errors[bounds])
        assert found == pytest.approx(best, rel=1e-5)


def squared_error(x: Tensor, quantizer: Any, importance: Tensor) -> float:
    return float(((quantizer(x) - x).double().square() * importance).sum())


def test_group_ranges_are_the_mean_the_envelope_or_better() -> None:
    x, importance = activations(), torch.rand(24, generator=torch.Generator().manual_seed(3)).double() + 0.5
    fitted = {
        how: fit_channel_groups(x, 4, [4], how, importance=importance)[4] for how in ("mean", "envelope", "searched")
    }
    points = channel_ranges(x).flatten(0, 1)
    centres = fitted["mean"].centres
    group = assign(points, centres)
    for index in range(4):
        own = points[group == index]
        for how, low, high in (
            ("mean", own[:, 0].mean(), own[:, 1].mean()),
            ("envelope", own[:, 0].min(), own[:, 1].max()),
        ):
            scale, zero_point = affine_parameters(low, high, 4)
            assert float(fitted[how].scale[index]) == pytest.approx(float(scale), rel=1e-3)
            assert abs(float(fitted[how].zero_point[index] - zero_point)) <= 1
    errors = {how: squared_error(x, quantizer, importance) for how, quantizer in fitted.items()}
    assert errors["searched"] < min(errors["mean"], errors["envelope"])
    assert all(torch.equal(quantizer.centres, centres) for quantizer in fitted.values())


def test_each_end_of_a_range_is_searched_for_itself() -> None:
    # An outlier at the lower end, which is best clipped, and many large values at the upper one.
    x, importance = torch.rand(8, 20, 24, generator=torch.Generator().manual_seed(0)), torch.ones(24).double()
    x[:, :, 12:] *= 2
    x[0, 0, 0] = -6.0
    searched = fit_channel_groups(x, 4, [1], "searched", importance=importance)[1]
    points = channel_ranges(x).flatten(0, 1)
    mean, envelope = points.mean(dim=0), torch.stack([points[:, 0].min(), points[:, 1].max()])
    together = []
    for share in EXTENSIONS:
        low, high = torch.lerp(mean, envelope, share)
        scale, zero_point = affine_parameters(low, high, 4)
        together.append(float((quantize_affine(x, scale, zero_point, 4) - x).square().sum()))
    assert squared_error(x, searched, importance) < 0.95 * min(together)


def test_more_groups_have_less_error() -> None:
    x, importance = activations(8, 20, 64), torch.ones(64).double()
    fitted = fit_channel_groups(x, 4, [1, 4, 16], "searched", importance=importance)
    errors = [squared_error(x, fitted[count], importance) for count in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]


def test_the_literal_zero_point_stays_among_the_codes() -> None:
    x = activations() + 20
    for clip in (False, True):
        fitted = fit_channel_groups(x, 4, [3], "mean", clip, importance=torch.ones(24).double())[3]
        assert bool(((fitted.zero_point >= 0) & (fitted.zero_point <= 15)).all()) == clip


@pytest.mark.parametrize("how", ["mean", "envelope", "searched"])
def test_rows_are_grouped_by_their_maximum(how: Any) -> None:
    attention = torch.randn(4, 2, 9, 9, generator=torch.Generator().manual_seed(0)).mul(4).softmax(-1)
    fitted = fit_row_groups(attention, 4, [1, 3], how, images=4)
    maxima = attention.amax(-1).flatten()
    group = assign(maxima[:, None], fitted[3].centres[:, None])
    for index in range(3):
        own = maxima[group == index]
        assert float(own.mean()) == pytest.approx(float(fitted[3].centres[index]), rel=1e-3)
        top = float(fitted[3].scale[index]) * 15
        if how == "envelope":
            assert top == pytest.approx(float(own.max()), rel=1e-5)
        else:
            assert float(own.mean()) * 0.999 <= top <= float(own.max()) * 1.001
    errors = [float((fitted[count](attention) - attention).square().sum()) for count in (1, 3)]
    assert errors[1] < errors[0]


def test_thinning_is_the_same_however_images_are_split() -> None:
    x = torch.arange(6 * 40 * 8).view(6, 40, 8)
    whole = thinned(x, 1, images=6, values=100)
    parts = [thinned(x[i : i + 2], 1, images=2, values=100) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape[1] < 40


def test_a_constant_channel_is_kept() -> None:
    x = activations()
    x[:, :, 3] = 0.0
    quantizer = fit_channel_groups(x, 4, [4], "searched", importance=torch.ones(24).double())[4]
    assert quantizer(x)[:, :, 3].abs().max() <= float(quantizer.scale.max())
    assert quantize_affine(torch.zeros(1), *affine_parameters(torch.zeros(1), torch.zeros(1), 4), 4).item() == 0
