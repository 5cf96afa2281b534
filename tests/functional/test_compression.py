import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.functional import Grid, encode, symmetric_grid, unsigned_grid
from lightning_quant.functional.compression import codes_of, container, pack, unpack
from lightning_quant.functional.grid import clamp_bounds, is_inside

few = settings(deadline=None, max_examples=60)
grids = st.builds(lambda bits, kind: kind(bits), st.integers(2, 8), st.sampled_from([symmetric_grid, unsigned_grid]))
values = st.lists(st.floats(-400, 400, width=32), min_size=1, max_size=30).map(torch.tensor)


def packed(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return pack(x, encode(x, scale, grid), scale, grid)


def mask(positions: Tensor, grid: Grid) -> Tensor:
    low, high = clamp_bounds(grid)
    return (positions > low) & (positions < high)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("kind", [symmetric_grid, unsigned_grid])
def test_one_byte_up_to_4_bits_two_up_to_8_none_beyond(bits: int, kind: type) -> None:
    grid = symmetric_grid(bits) if kind is symmetric_grid else unsigned_grid(bits)
    holder = container(grid)
    assert (None if holder is None else holder[0].itemsize) == (1 if bits <= 4 else 2 if bits <= 8 else None)


def test_more_than_8_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of more than 8 bits"):
        packed(torch.ones(2), torch.tensor(1.0), symmetric_grid(9))


@few
@given(values, st.floats(0.0625, 20, width=32).map(torch.tensor), grids)
def test_codes_come_back_exactly(x: Tensor, scale: Tensor, grid: Grid) -> None:
    assert torch.equal(codes_of(packed(x, scale, grid), grid), encode(x, scale, grid))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_mid_points_come_back_exactly(bits: int, signed: bool) -> None:
    grid, scale = symmetric_grid(bits) if signed else unsigned_grid(bits), torch.tensor(1.0)
    x = torch.arange(-300.0, 300.0) + 0.5
    assert torch.equal(codes_of(packed(x, scale, grid), grid), encode(x, scale, grid))


@few
@given(values, st.floats(0.0625, 20, width=32).map(torch.tensor), grids)
def test_positions_inside_the_clamp_are_known_to_half_a_level(x: Tensor, scale: Tensor, grid: Grid) -> None:
    holder = container(grid)
    assert holder is not None
    positions = unpack(packed(x, scale, grid), grid)
    inside = is_inside(x, scale, grid)
    expected = (x / scale)[inside]
    # Packing moves a position by a hair towards 0.
    hair = expected.abs() * 2.0**-20
    assert ((positions[inside] - expected).abs() <= 0.5 / holder[1] + hair + 1e-4).all()


def test_a_large_position_is_known_to_half_a_level_and_a_hair() -> None:
    x, scale, grid = torch.tensor([172.6232]), torch.tensor(1.0625), unsigned_grid(8)
    (position,) = unpack(packed(x, scale, grid), grid)
    assert abs(float(position) - 172.6232 / 1.0625) <= 0.5 / 128 + 172.6232 / 1.0625 * 2.0**-20 + 2e-5


@few
@given(st.integers(-600, 600), st.integers(2, 4), st.booleans())
def test_the_mask_comes_back_exactly_on_the_levels(sixteenths: int, bits: int, signed: bool) -> None:
    grid = symmetric_grid(bits) if signed else unsigned_grid(bits)
    x, scale = torch.tensor([sixteenths / 16]), torch.tensor(1.0)
    assert torch.equal(mask(unpack(packed(x, scale, grid), grid), grid), is_inside(x, scale, grid))


@few
@given(values, st.floats(0.0625, 20, width=32).map(torch.tensor), grids)
def test_the_mask_comes_back(x: Tensor, scale: Tensor, grid: Grid) -> None:
    position = x.double() / scale.double()
    clear = ((position - grid.low).abs() > 1e-3) & ((position - grid.high).abs() > 1e-3)
    found = mask(unpack(packed(x, scale, grid), grid), grid)
    assert torch.equal(found[clear], is_inside(x, scale, grid)[clear])


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_itself_is_inside_the_clamp(bits: int, signed: bool) -> None:
    grid = symmetric_grid(bits) if signed else unsigned_grid(bits)
    codes = torch.arange(grid.low, grid.high + 1).float()
    for scale in (torch.tensor(1.0), torch.tensor(0.3)):
        kept = packed(codes * scale, scale, grid)
        assert mask(unpack(kept, grid), grid).all()
        assert torch.equal(codes_of(kept, grid), codes)


def test_layout_in_memory_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    scale, grid = torch.tensor(0.2), symmetric_grid(4)
    last = x.to(memory_format=torch.channels_last)
    assert packed(last, scale, grid).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed(last, scale, grid), packed(x, scale, grid))
    # Codes in another layout than the values.
    assert torch.equal(pack(last, encode(x, scale, grid), scale, grid), packed(x, scale, grid))
    assert torch.equal(packed(x[:, ::2], scale, grid), packed(x, scale, grid)[:, ::2])
