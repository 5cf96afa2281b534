"""Quantizers that look at each image: state, dtypes, and what they promise of batches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.functional.grid import decode, encode
from lightning_quant.quantizers import FixedQuantizer, Quantizer
from lightning_quant.quantizers.base import quantizer_of_state
from lightning_quant.quantizers.dynamic import ChannelQuantizer, LogQuantizer, TokenQuantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, InstanceQuantizer, RowGroupQuantizer


def grouped(bits: int = 4) -> GroupQuantizer:
    quantizer = GroupQuantizer(bits, 2)
    quantizer.set_ranges(torch.tensor([[-1.0, 1.0], [-4.0, 5.0], [0.5, 2.0]]))
    return quantizer


def rows(bits: int = 4) -> RowGroupQuantizer:
    quantizer = RowGroupQuantizer(bits, 2)
    quantizer.set_ranges(torch.tensor([0.3, 0.8]))
    return quantizer


def logarithmic(bits: int = 4) -> LogQuantizer:
    quantizer = LogQuantizer(bits)
    quantizer.scale, quantizer.ready = torch.tensor(0.9), True
    return quantizer


MAKERS: dict[str, Callable[[], Quantizer]] = {
    "channels in groups": grouped,
    "rows in groups": rows,
    "tokens": lambda: TokenQuantizer(4),
    "rows": lambda: TokenQuantizer(4, from_zero=True),
    "channels": lambda: ChannelQuantizer(4),
    "logarithm": logarithmic,
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def attention(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


@every
def test_the_state_makes_the_same_quantizer(make: Callable[[], Quantizer]) -> None:
    quantizer = make()
    again = quantizer_of_state(quantizer.get_extra_state())
    again.load_state_dict(quantizer.state_dict())
    assert type(again) is type(quantizer)
    assert again.ready
    assert torch.equal(again(attention()), quantizer(attention()))
    for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(copied(attention()), quantizer(attention()))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_kept_and_codes_are_those_of_fp32(
    make: Callable[[], Quantizer], dtype: torch.dtype
) -> None:
    x = attention().to(dtype)
    found = make()(x)
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert torch.equal(found, make()(x.float()).to(dtype))


@every
def test_there_are_at_most_as_many_values_as_codes(make: Callable[[], Quantizer]) -> None:
    x = attention().repeat(1, 40, 1)[:1]
    values = make()(x)[0]
    for channel in values.T if isinstance(make(), ChannelQuantizer | GroupQuantizer) else values:
        assert len(channel.unique()) <= 16


@every
def test_images_do_not_know_each_other(make: Callable[[], Quantizer]) -> None:
    x, quantizer = attention(), make()
    assert torch.equal(torch.cat([quantizer(x[i : i + 1]) for i in range(3)]), quantizer(x))
    assert torch.equal(quantizer(x[[2, 0, 1]]), quantizer(x)[[2, 0, 1]])


@every
def test_scale_and_zero_point_that_it_tells_are_those_of_its_values(make: Callable[[], Quantizer]) -> None:
    x, quantizer = attention(), make()
    affine = quantizer.affine_of(x)
    # The steps of a logarithm are not uniform.
    assert (affine is None) == isinstance(quantizer, LogQuantizer)
    if affine is not None:
        scale, zero_point = affine
        torch.testing.assert_close(
            decode(encode(x, scale, quantizer.grid, zero_point), scale, zero_point), quantizer(x)
        )


@every
def test_of_no_images_nothing_is_made(make: Callable[[], Quantizer]) -> None:
    assert make()(attention()[:0]).shape == attention()[:0].shape


@every
def test_a_state_of_another_kind_is_refused(make: Callable[[], Quantizer]) -> None:
    with pytest.raises(CheckpointError, match="quantizes with a"):
        FixedQuantizer(4).load_state_dict(make().state_dict(), strict=False)


@pytest.mark.parametrize("make", [grouped, lambda: ChannelQuantizer(4)])
def test_windows_of_an_image_stand_together(make: Callable[[], InstanceQuantizer]) -> None:
    x, quantizer = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1)).mul(3), make()
    quantizer.instances = 2
    together = quantizer(x.view(2, 12, 5)).view(6, 4, 5)
    assert torch.equal(quantizer(x), together)
    quantizer.instances = 4
    with pytest.raises(
        ConfigurationError, match=r"expects \(images, tokens, channels\), but found \(6, 4, 5\) for 4 images"
    ):
        quantizer(x)


def test_a_row_alone_needs_another_quantizer() -> None:
    with pytest.raises(ConfigurationError, match="use a FixedQuantizer"):
        grouped()(torch.zeros(3, 5))


def test_each_channel_of_each_image_has_its_own_range_at_the_upper_bound() -> None:
    x = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 100.0])
    apart = (ChannelQuantizer(8)(x) - x).abs().amax(dim=1)
    steps = (x.amax(dim=1) - x.amin(dim=1)) / 255
    assert (apart <= steps * 1.01).all()


class TestKeptWeight:
    """The quantized weight is made once for an evaluation."""

    def quantizer(self, weight: nn.Parameter) -> FixedQuantizer:
        quantizer = FixedQuantizer(4, symmetric=False, axis=0)
        quantizer.initialize(weight)
        return quantizer

    def test_it_is_made_once(self) -> None:
        weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
        quantizer = self.quantizer(weight)
        with torch.no_grad():
            assert quantizer(weight) is quantizer(weight)
            assert quantizer(weight.clone()) is not quantizer(weight)
        assert quantizer(weight) is not quantizer(weight)
        assert quantizer(weight).requires_grad

    def test_a_change_of_weight_or_range_makes_it_anew(self) -> None:
        weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
        quantizer = self.quantizer(weight)
        with torch.no_grad():
            before = quantizer(weight)
            weight.mul_(0.5)
            halved = quantizer(weight)
            assert not torch.equal(halved, before)
            quantizer.scale = quantizer.scale * 2
            assert not torch.equal(quantizer(weight), halved)
            other = nn.Parameter(torch.zeros(4, 6))
            assert quantizer(other).abs().max() < quantizer(weight).abs().max()

    def test_copies_and_pickles_are_without_it(self) -> None:
        weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        quantizer = self.quantizer(weight)
        empty = len(pickle.dumps(quantizer))
        with torch.no_grad():
            kept = quantizer(weight)
            assert len(pickle.dumps(quantizer)) == empty
            assert copy.deepcopy(quantizer)(weight) is not kept
            assert torch.equal(copy.deepcopy(quantizer)(weight), kept)
