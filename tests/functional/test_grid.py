from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.oracle import quantize_unsigned, quantize_weight, round_through
from lightning_quant.errors import ConfigurationError
from lightning_quant.functional import (
    Grid,
    check_bits,
    decode,
    encode,
    fake_quantize,
    per_channel,
    symmetric_grid,
    unsigned_grid,
)
from lightning_quant.functional.grid import clamp_bounds, exact_in, is_inside

few = settings(deadline=None, max_examples=40)
real = st.floats(-1e4, 1e4, width=32)
values = st.lists(real, min_size=1, max_size=30).map(torch.tensor)
scales = st.floats(2.0**-6, 8.0, width=32).map(torch.tensor)
binary_scales = st.integers(-6, 6).map(lambda e: torch.tensor(2.0**e))
bit_widths = st.sampled_from([2, 3, 4, 5, 8, 16])
grids = st.builds(lambda bits, kind: kind(bits), bit_widths, st.sampled_from([symmetric_grid, unsigned_grid]))


def slow_code(x: float, scale: float, grid: Grid, zero_point: int = 0) -> int:
    """Python rounds fractions half to even."""
    return max(grid.low, min(grid.high, round(Fraction(x) / Fraction(scale)) + zero_point))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "high"), [(2, 1), (4, 7), (8, 127), (16, 32767)])
def test_symmetric_codes_have_no_most_negative_one(bits: int, high: int) -> None:
    assert symmetric_grid(bits) == Grid(-high, high)
    assert unsigned_grid(bits) == Grid(0, 2 * high + 1)


@pytest.mark.parametrize("bits", [1, 0, -4, 17, 32, 4.0, True, "4", None])
def test_other_bit_widths_are_refused_with_what_to_write(bits: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"weight_bits=.*from 2 to 16, for example weight_bits=4"):
        check_bits(bits, "weight_bits")


def test_float_is_a_bit_width_only_where_allowed() -> None:
    assert check_bits(32, allow_float=True) == 32
    with pytest.raises(ConfigurationError, match="or 32 to leave the tensor in float"):
        check_bits(31, allow_float=True)


@few
@given(values, binary_scales, grids)
def test_equal_to_fractions(x: Tensor, scale: Tensor, grid: Grid) -> None:
    assert encode(x, scale, grid).tolist() == [slow_code(v, scale.item(), grid) for v in x.tolist()]


@few
@given(values, scales, st.integers(0, 15))
def test_equal_to_fractions_with_a_zero_point(x: Tensor, scale: Tensor, zero_point: int) -> None:
    # FP64, so that the quotient is rounded to a mid-point only where it is one.
    codes = encode(x.double(), scale.double(), Grid(0, 15), torch.tensor(float(zero_point)))
    assert codes.tolist() == [slow_code(v, scale.item(), Grid(0, 15), zero_point) for v in x.tolist()]


@few
@given(st.integers(-40000, 70000), binary_scales, grids)
def test_mid_points_go_to_the_even_code(below: int, scale: Tensor, grid: Grid) -> None:
    even = below if below % 2 == 0 else below + 1
    code = encode((below + 0.5) * scale, scale, grid)
    assert code.item() == max(grid.low, min(grid.high, even))


@few
@given(values, scales, grids)
def test_monotone(x: Tensor, scale: Tensor, grid: Grid) -> None:
    codes = encode(x.sort().values, scale, grid)
    assert (codes.diff() >= 0).all()


@few
@given(values, scales, grids)
def test_idempotent(x: Tensor, scale: Tensor, grid: Grid) -> None:
    once = fake_quantize(x, scale, grid)
    assert torch.equal(fake_quantize(once, scale, grid), once)


@few
@given(values, scales, bit_widths)
def test_symmetric_under_sign(x: Tensor, scale: Tensor, bits: int) -> None:
    grid = symmetric_grid(bits)
    assert torch.equal(encode(-x, scale, grid), -encode(x, scale, grid))


@few
@given(values, scales, grids)
def test_codes_are_whole_and_inside_the_grid(x: Tensor, scale: Tensor, grid: Grid) -> None:
    codes = encode(x, scale, grid)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high


@few
@given(values, scales, grids)
def test_error_within_half_a_step_inside_the_range(x: Tensor, scale: Tensor, grid: Grid) -> None:
    wide, step = x.double(), scale.double()
    inside = wide[is_inside(wide, step, grid)]
    error = (decode(encode(inside, step, grid), step) - inside).abs()
    assert (error <= step * (0.5 + 1e-9)).all()


@few
@given(values, scales, grids, st.integers(-8, 8))
def test_codes_do_not_change_with_a_power_of_two(x: Tensor, scale: Tensor, grid: Grid, exponent: int) -> None:
    x = x.where(x.abs() > 1e-20, torch.tensor(0.0))
    factor = 2.0**exponent
    assert torch.equal(encode(x * factor, scale * factor, grid), encode(x, scale, grid))


@few
@given(values, scales, grids)
def test_zero_is_exact(x: Tensor, scale: Tensor, grid: Grid) -> None:
    assert fake_quantize(torch.zeros_like(x), scale, grid).eq(0).all()


@few
@given(st.integers(0, 3), grids, st.booleans())
def test_per_channel_is_a_loop_over_channels(axis: int, grid: Grid, with_zero_point: bool) -> None:
    x = normal(2, 3, 4, 5)
    scale = normal(x.shape[axis], seed=1).abs() + 0.01
    zero_point = torch.arange(1.0, x.shape[axis] + 1) if with_zero_point else None
    shaped = None if zero_point is None else per_channel(zero_point, axis, 4)
    whole = encode(x, per_channel(scale, axis, 4), grid, shaped)
    for index in range(x.shape[axis]):
        own = None if zero_point is None else zero_point[index]
        assert torch.equal(
            whole.select(axis, index), encode(x.select(axis, index).contiguous(), scale[index], grid, own)
        )


@few
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), grids)
def test_per_group_is_a_loop_over_groups(size: int, grid: Grid) -> None:
    x, scale = normal(5, 12), normal(12 // size, 1).abs() + 0.01
    whole = encode(x.unflatten(-1, (-1, size)), scale, grid).flatten(-2)
    parts = [encode(part.contiguous(), s, grid) for part, s in zip(torch.split(x, size, -1), scale[:, 0], strict=True)]
    assert torch.equal(whole, torch.cat(parts, -1))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last"])
def test_codes_do_not_depend_on_the_layout_in_memory(layout: str) -> None:
    base = normal(4, 6, 8, 10)
    x = {
        "transposed": base.transpose(0, 3),
        "strided": base[..., ::2],
        "expanded": base[:1].expand(4, 6, 8, 10),
        "channels_last": base.to(memory_format=torch.channels_last),
    }[layout]
    scale, grid = torch.tensor(0.3), symmetric_grid(4)
    assert torch.equal(encode(x, scale, grid), encode(x.clone(memory_format=torch.contiguous_format), scale, grid))


def test_codes_of_a_large_tensor_are_those_of_its_parts() -> None:
    x, scale, grid = normal(2**17 + 3), torch.tensor(0.3), symmetric_grid(4)
    noise = torch.rand(x.shape) - 0.5
    for kind in (None, noise):
        parts = [
            encode(x[i::2].clone(), scale, grid, noise=None if kind is None else kind[i::2].clone()) for i in (0, 1)
        ]
        whole = encode(x, scale, grid, noise=kind)
        assert torch.equal(whole[::2], parts[0])
        assert torch.equal(whole[1::2], parts[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_computed_in_fp32_whatever_the_dtype(dtype: torch.dtype) -> None:
    x = normal(5000).to(dtype)
    scale, grid = torch.tensor(0.0123), symmetric_grid(8)
    codes = encode(x, scale, grid)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, encode(x.float(), scale, grid))
    in_dtype = (x / scale.to(dtype)).round().clamp(*grid)
    assert not torch.equal(codes, in_dtype.float()), "a tensor on which the dtype makes no difference shows nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_on_the_grid_keep_their_dtype_and_shape(dtype: torch.dtype) -> None:
    x = normal(3, 0, 2).to(dtype)
    assert fake_quantize(x, torch.tensor(0.1), symmetric_grid(4)).dtype == dtype
    assert fake_quantize(x, torch.tensor(0.1), symmetric_grid(4)).shape == x.shape


def test_nan_stays_nan_and_infinities_are_clamped() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.4])
    codes = encode(x, torch.tensor(1.0), Grid(-7, 7))
    assert codes.isnan().tolist() == [True, False, False, False]
    assert codes[1:].tolist() == [7, -7, 0]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_stochastic_rounding_is_unbiased(fraction: float, bits: int) -> None:
    grid, count = symmetric_grid(bits), 100_000
    noise = torch.rand(count, generator=torch.Generator().manual_seed(bits)) - 0.5
    x = torch.full((count,), grid.high - 1 + fraction)
    codes = encode(x, torch.tensor(1.0), grid, noise=noise)
    assert set(codes.tolist()) == {grid.high - 1, grid.high}
    standard_error = (fraction * (1 - fraction) / count) ** 0.5
    assert abs((codes.double() - grid.high + 1).mean() - fraction) < 4 * standard_error


def test_encode_writes_where_it_is_told_even_into_the_noise() -> None:
    x, noise = normal(100), torch.rand(100) - 0.5
    expected = encode(x, torch.tensor(0.2), Grid(-7, 7), noise=noise.clone())
    assert encode(x, torch.tensor(0.2), Grid(-7, 7), noise=noise, out=noise) is noise
    assert torch.equal(noise, expected)


@few
@given(values.map(lambda x: x / 1e4), st.floats(0.01, 2), st.sampled_from([2, 4, 8]), st.booleans())
def test_values_and_gradients_equal_the_oracle(x: Tensor, bound: float, bits: int, signed: bool) -> None:
    grid = symmetric_grid(bits) if signed else unsigned_grid(bits)
    results = []
    for quantize in (
        lambda v, r: fake_quantize(v, r / grid.high, grid),
        lambda v, r: quantize_weight(v, r, bits) if signed else quantize_unsigned(v, r, bits),
    ):
        v = x.double().requires_grad_()
        r = torch.tensor(bound, dtype=torch.float64, requires_grad=True)
        out = quantize(v, r)
        (out * torch.arange(1.0, len(x) + 1)).sum().backward()
        results.append((out.detach(), v.grad, r.grad))
    # PyTorch versions differ in the gradient of a clamp at its very bounds.
    position = x.double() / bound * grid.high
    at_the_edge = ((position - grid.low).abs() < 1e-6) | ((position - grid.high).abs() < 1e-6)
    at_a_mid_point = (position % 1 - 0.5).abs() < 1e-6
    if not (at_the_edge | at_a_mid_point).any():
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_per_channel_with_a_zero_point_is_a_loop_over_channels() -> None:
    x, scale = normal(3, 50), torch.tensor([0.1, 0.2, 0.3])
    zero_point = torch.tensor([3.0, 8.0, 12.0])
    a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    fake_quantize(a, s[:, None], Grid(0, 15), zero_point[:, None]).square().sum().backward()
    assert a.grad is not None
    assert s.grad is not None
    for i in range(3):
        b, t = x[i].clone().requires_grad_(), scale[i].clone().requires_grad_()
        fake_quantize(b, t, Grid(0, 15), zero_point[i]).square().sum().backward()
        assert b.grad is not None
        assert t.grad is not None
        assert torch.equal(a.grad[i], b.grad)
        torch.testing.assert_close(s.grad[i], t.grad)


def asymmetric(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values of which the clamp of 4 bits moves some on both sides, scales, zero points, and weights of a loss."""
    x, weights = normal(2, 3, 4, 5).double(), normal(2, 3, 4, 5, seed=1).double()
    scale = normal(1, *shape, seed=2)[0].double().abs() * 0.1 + 0.1
    zero_point = torch.randint(3, 9, shape, generator=torch.Generator().manual_seed(3)).double()
    return x, scale, zero_point, weights


def slow_affine(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """LSQ+ in FP64: s (round(clamp(x/s + z, 0, 15)) - z), by autograd."""
    return scale * (round_through((x / scale + zero_point).clamp(0, 15)) - zero_point)


every_shape = pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1), (1, 1, 1, 5)])


@every_shape
def test_gradients_of_scale_and_zero_point_equal_the_oracle(shape: tuple[int, ...]) -> None:
    x, scale, zero_point, weights = asymmetric(shape)
    inside = is_inside(x, scale, Grid(0, 15), zero_point)
    assert 0.2 < inside.double().mean() < 0.95, "both sides of the clamp must occur"
    results = []
    for quantize in (lambda *leaves: fake_quantize(leaves[0], leaves[1], Grid(0, 15), leaves[2]), slow_affine):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        output = quantize(*leaves)
        (output * weights).sum().backward()
        results.append((output.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_shape
def test_beyond_the_clamp_the_gradients_are_differences_of_the_function(shape: tuple[int, ...]) -> None:
    x, scale, zero_point, weights = asymmetric(shape)
    x = torch.where(x > 0, 20.0, -20.0).double()
    leaves = [scale.clone().requires_grad_(), zero_point.clone().requires_grad_()]
    (fake_quantize(x, leaves[0], Grid(0, 15), leaves[1]) * weights).sum().backward()
    for index, leaf in enumerate(leaves):
        assert leaf.grad is not None
        found = torch.zeros_like(leaf)
        for place in range(leaf.numel()):
            step = torch.zeros_like(leaf)
            step.view(-1)[place] = 1e-4
            ends = []
            for sign in (1, -1):
                s, z = (t + sign * step * (i == index) for i, t in enumerate((scale, zero_point)))
                ends.append((fake_quantize(x, s, Grid(0, 15), z) * weights).sum())
            found.view(-1)[place] = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(leaf.grad, found, rtol=1e-6, atol=1e-6)


def test_a_gradient_does_not_depend_on_which_others_are_asked_for() -> None:
    *tensors, weights = (t.float() for t in asymmetric((3, 1, 1)))

    def gradients(asked: tuple[bool, ...]) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, asked, strict=True)]
        (fake_quantize(leaves[0], leaves[1], Grid(0, 15), leaves[2]) * weights).sum().backward()
        return [leaf.grad for leaf in leaves]

    everything = gradients((True, True, True))
    for index in range(3):
        alone = gradients(tuple(i == index for i in range(3)))
        assert [gradient is not None for gradient in alone] == [i == index for i in range(3)]
        assert torch.equal(alone[index], everything[index])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_clamp_acts_at_the_same_values_in_every_dtype(dtype: torch.dtype) -> None:
    x = normal(4000).to(dtype)
    scale, grid = torch.tensor(0.0999), symmetric_grid(4)
    assert torch.equal(is_inside(x, scale, grid), is_inside(x.float(), scale, grid))
    grads = []
    for v in (x.clone(), x.float()):
        s = scale.clone().requires_grad_()
        fake_quantize(v.requires_grad_(), s, grid).sum().backward()
        assert s.grad is not None
        grads.append(s.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("grid", [Grid(-7, 7), Grid(0, 15), Grid(-127, 127), Grid(0, 65535)])
def test_the_ends_of_the_grid_are_within_the_clamp_and_the_next_numbers_outside(grid: Grid) -> None:
    low, high = (torch.tensor(bound) for bound in clamp_bounds(grid))
    assert low < grid.low <= grid.high < high
    assert low > grid.low - 1e-6 * max(1, grid.high)
    assert high < grid.high * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 16)])
def test_a_dtype_that_is_exact_holds_every_code(dtype: torch.dtype, bits: int) -> None:
    for kind in (symmetric_grid, unsigned_grid):
        for width in range(2, 17):
            grid = kind(width)
            codes = torch.arange(grid.low, grid.high + 1).double()
            assert exact_in(dtype, grid) == torch.equal(codes.to(dtype).double(), codes)
    assert exact_in(dtype, unsigned_grid(bits))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float32])
def test_decode_takes_codes_of_any_dtype(dtype: torch.dtype) -> None:
    codes = torch.arange(0, 16, dtype=dtype)
    assert torch.equal(decode(codes, torch.tensor(0.5), torch.tensor(4.0)), (torch.arange(16.0) - 4) / 2)
