import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_quant.errors import ConfigurationError
from lightning_quant.functional import packing
from lightning_quant.functional.packing import pack_bits, packed_size, unpack_bits

BITS = st.integers(2, 16)


def codes_of(bits: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))


@given(BITS, st.integers(0, 100), st.integers(0, 10), st.sampled_from([torch.int32, torch.int64, torch.float32]))
@settings(deadline=None)
def test_what_is_packed_is_unpacked_in_the_fewest_bytes(bits: int, count: int, seed: int, dtype: torch.dtype) -> None:
    codes = codes_of(bits, count, seed)
    packed = pack_bits(codes.to(dtype), bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (math.ceil(count * bits / 8),))
    assert torch.equal(unpack_bits(packed, bits, count), codes.int())


@given(BITS, st.integers(0, 60), st.integers(0, 10))
@settings(deadline=None)
def test_the_bytes_are_one_number_whose_digits_are_the_codes(bits: int, count: int, seed: int) -> None:
    codes = codes_of(bits, count, seed).tolist()
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    expected = number.to_bytes(packed_size(count, bits), "little")
    assert bytes(pack_bits(torch.tensor(codes), bits).tolist()) == expected


@pytest.mark.parametrize("bits", [3, 4, 6, 13])
def test_blocks_leave_no_seam(bits: int) -> None:
    codes = codes_of(bits, 8 * 7 + 5)
    whole = pack_bits(codes, bits)
    with mock.patch.object(packing, "BLOCK", 16):
        assert torch.equal(pack_bits(codes, bits), whole)
        assert torch.equal(unpack_bits(whole, bits, len(codes)), codes.int())


def test_any_shape_in_the_order_of_its_indices() -> None:
    codes = codes_of(4, 24).view(4, 6).t()
    assert torch.equal(unpack_bits(pack_bits(codes, 4), 4, 24).view(6, 4), codes.int())


@pytest.mark.parametrize("code", [-1, 16, 0.5])
def test_a_code_that_does_not_fit_is_refused(code: float) -> None:
    with pytest.raises(ConfigurationError, match="whole numbers from 0 to 15, the range of 4 bits"):
        pack_bits(torch.tensor([3, code]), 4)


@pytest.mark.parametrize("packed", [torch.zeros(4, dtype=torch.uint8), torch.zeros(3)])
def test_bytes_of_another_length_or_dtype_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="4 codes of 6 bits take 3 bytes"):
        unpack_bits(packed, 6, 4)
