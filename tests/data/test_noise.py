"""Noise of an image by its number: the same in every batch, different from any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_quant.data.noise import drawn_number, initial_noise, numbers, step_noise
from lightning_quant.errors import ConfigurationError

SHAPE = (2, 3, 4)
Draw = Callable[[list[int]], Tensor]


@pytest.mark.parametrize("draw", [lambda ids: initial_noise(SHAPE, ids, 3), lambda ids: step_noise(SHAPE, ids, 5, 3)])
def test_a_row_depends_on_its_number_alone(draw: Draw) -> None:
    together = draw([0, 1, 2, 9])
    assert together.shape == (4, *SHAPE)
    assert torch.equal(together[[3, 1]], draw([9, 1]))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(draw([0, 1, 2, 9]), together)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_step_and_seed_has_its_own() -> None:
    drawn = [initial_noise(SHAPE, range(3), seed) for seed in (0, 1, 2**40)]
    drawn += [step_noise(SHAPE, range(3), k, seed) for k in (0, 1, 2) for seed in (0, 1, 2**40)]
    rows = torch.cat(drawn).flatten(1)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    # A number of one image is no number of another.
    assert rows.unique().numel() == rows.numel()


def test_seeds_and_numbers_are_not_mixed_up() -> None:
    found = [initial_noise((1, 1, 4), [number], seed) for number, seed in ((1, 0), (0, 1), (0, 2**32), (1, 2**32))]
    assert len({tuple(noise.flatten().tolist()) for noise in found}) == 4


def test_it_is_standard_normal() -> None:
    for noise in (initial_noise((1, 8, 8), range(1000), 0), step_noise((1, 8, 8), range(1000), 3, 0)):
        # Within 5 standard errors of 64 000 draws.
        assert abs(float(noise.mean())) < 5 / 253
        assert abs(float(noise.var()) - 1) < 5 * 2**0.5 / 253
        assert abs(float(noise.pow(4).mean()) - 3) < 5 * 96**0.5 / 253


def test_draws_of_before_are_those_of_now() -> None:
    expected = torch.tensor([0.6139, 1.0156])
    assert torch.allclose(initial_noise((1, 1, 2), [5], seed=7).flatten(), expected, atol=1e-4)


def test_another_dtype_is_the_same_noise() -> None:
    assert torch.equal(initial_noise(SHAPE, [1], 0, torch.bfloat16), initial_noise(SHAPE, [1], 0).bfloat16())


def test_drawn_numbers_are_even() -> None:
    counts = torch.tensor([drawn_number(number, 0, 4) for number in range(4000)]).bincount()
    assert counts.shape == (4,)
    assert ((counts - 1000).abs() < 5 * 750**0.5).all()


def test_what_is_no_number_of_an_image_is_refused() -> None:
    assert numbers(torch.tensor([3, 1])) == numbers((3, 1)) == [3, 1]
    with pytest.raises(ConfigurationError, match=r"ids contains -1: expected image numbers"):
        initial_noise(SHAPE, [0, -1], 0)
    with pytest.raises(ConfigurationError, match=r"ids contains 4294967296"):
        numbers([2**32])
    with pytest.raises(ConfigurationError, match=r"seed=-2: expected a non-negative number"):
        initial_noise(SHAPE, [0], -2)
