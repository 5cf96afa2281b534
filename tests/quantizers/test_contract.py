"""What every quantizer promises. A new one is added to QUANTIZERS and to nothing else here."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from lightning_quant.functional import mse_search, percentile
from lightning_quant.functional.grid import decode, encode
from lightning_quant.gradient import LargeGradientInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import swap
from lightning_quant.nn.structure import strip
from lightning_quant.quantizers import (
    FixedQuantizer,
    LearnedQuantizer,
    Quantizer,
    RoundedQuantizer,
    TimestepQuantizer,
)
from lightning_quant.quantizers.base import FORMAT_VERSION, KINDS, quantizer_of_state, read_state

Maker = Callable[[int], Quantizer]


def narrow(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return percentile(x, 90.0, axis)


def searched(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return mse_search(x, 4, True, axis, candidates=10)


def gradient_quantizer(bits: int) -> GradientQuantizer:
    quantizer = GradientQuantizer(bits, LargeGradientInterval())
    quantizer.run.noise = NoiseSource(0)
    return quantizer


QUANTIZERS: dict[str, Maker] = {
    "fixed": FixedQuantizer,
    "fixed with zero point": partial(FixedQuantizer, symmetric=False),
    "fixed per channel": partial(FixedQuantizer, axis=1),
    "fixed per channel with zero point": partial(FixedQuantizer, symmetric=False, axis=-1),
    "fixed percentile": partial(FixedQuantizer, estimator=narrow),
    "fixed least error": partial(FixedQuantizer, estimator=searched),
    "learned": LearnedQuantizer,
    "learned signed": partial(LearnedQuantizer, signed=True),
    "gradient": gradient_quantizer,
    "timestep": TimestepQuantizer,
    "timestep with groups": partial(TimestepQuantizer, starts=(900, 400, 30)),
    "timestep with groups and parts": partial(TimestepQuantizer, starts=(900, 400), parts=(2, 4)),
    "rounded": RoundedQuantizer,
    "rounded per tensor and symmetric": partial(RoundedQuantizer, symmetric=True, axis=None),
}


def cases(*without: str) -> pytest.MarkDecorator:
    kept = {name: make for name, make in QUANTIZERS.items() if not name.startswith(without)}
    return pytest.mark.parametrize("make", kept.values(), ids=kept.keys())


every = cases()
# One of a weight keeps its codes, whatever it is called with.
of_any_tensor = cases("rounded")
nearest = cases("gradient")
nearest_of_any_tensor = cases("gradient", "rounded")


def sample(seed: int = 0) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def is_ready(quantizer: Quantizer) -> bool:
    return quantizer.ready


def started(make: Maker, bits: int = 4) -> Quantizer:
    quantizer = make(bits)
    quantizer.initialize(sample().abs() if isinstance(quantizer, GradientQuantizer) else sample())
    assert quantizer.ready
    return quantizer


def output(quantizer: Quantizer, x: Tensor) -> Tensor:
    """From the same noise each time, at the same timestep."""
    if isinstance(quantizer, GradientQuantizer):
        quantizer.run.noise = NoiseSource(0)
    if isinstance(quantizer, TimestepQuantizer):
        quantizer.at(300)
    result: Tensor = quantizer(x)
    return result.detach()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_kept(make: Maker, dtype: torch.dtype) -> None:
    x = sample().to(dtype)
    moved = output(started(make), x)
    assert (moved.shape, moved.dtype) == (x.shape, x.dtype)


def with_one_range(quantizer: Quantizer, moved: Tensor) -> tuple[Tensor, ...]:
    if isinstance(quantizer, TimestepQuantizer):
        return torch.split(moved, list(quantizer.parts) or moved.shape[1], 1)
    axis = getattr(quantizer, "axis", None)
    return (moved,) if axis is None else moved.unbind(axis)


@every
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_more_values_than_codes(make: Maker, bits: int) -> None:
    quantizer = started(make, bits)
    moved = output(quantizer, sample(1))
    assert all(len(set(part.flatten().tolist())) <= 2**bits for part in with_one_range(quantizer, moved))
    assert not torch.equal(moved, sample(1))


@nearest
def test_scale_and_zero_point_that_it_tells_are_those_of_its_values(make: Maker) -> None:
    quantizer = started(make)
    moved = output(quantizer, sample())
    affine = quantizer.affine_of(sample())
    assert affine is not None
    scale, zero_point = affine
    torch.testing.assert_close(decode(encode(sample(), scale, quantizer.grid, zero_point), scale, zero_point), moved)


@nearest_of_any_tensor
def test_idempotent(make: Maker) -> None:
    quantizer = started(make)
    once = output(quantizer, sample(1))
    assert torch.equal(output(quantizer, once), once)


@of_any_tensor
def test_zero_stays_zero(make: Maker) -> None:
    quantizer = started(make)
    assert output(quantizer, torch.zeros(8, 6)).eq(0).all()
    x = sample()
    x[::2] = 0
    assert output(quantizer, x)[::2].eq(0).all()


@every
def test_the_error_shrinks_with_the_bits(make: Maker) -> None:
    errors = [(output(started(make, bits), sample()) - sample()).abs().mean() for bits in (2, 4, 6)]
    assert errors[0] > errors[1] > errors[2]


@every
def test_state_dict_round_trip_is_strict_and_bit_equal(make: Maker) -> None:
    quantizer, other = started(make), make(4)
    assert not is_ready(other)
    other.load_state_dict(quantizer.state_dict(), strict=True)
    assert other.ready
    assert torch.equal(output(other, sample(1)), output(quantizer, sample(1)))
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), quantizer.state_dict().values(), strict=True)
    )


@every
def test_a_state_that_was_not_ready_is_loaded_as_such(make: Maker) -> None:
    quantizer = started(make)
    quantizer.load_state_dict(make(4).state_dict())
    assert not is_ready(quantizer)


@every
def test_another_bit_width_is_refused_with_what_to_write(make: Maker) -> None:
    with pytest.raises(CheckpointError, match=r"made with 8 bits .* quantizes with 4: write 8 bits"):
        make(4).load_state_dict(started(make, 8).state_dict())


@every
def test_its_state_alone_makes_it_again(make: Maker) -> None:
    quantizer = started(make)
    made = quantizer_of_state(quantizer.get_extra_state())
    assert type(made) is type(quantizer)
    assert not is_ready(made)
    made.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(output(made, sample(1)), output(quantizer, sample(1)))
    assert torch.equal(made.get_extra_state(), quantizer.get_extra_state())


@every
def test_what_is_not_ready_makes_the_same_again(make: Maker) -> None:
    state = make(5).get_extra_state()
    assert torch.equal(quantizer_of_state(state).get_extra_state(), state)


@every
def test_the_state_of_another_class_is_refused_with_both_names(make: Maker) -> None:
    quantizer = make(4)
    other = LearnedQuantizer(4) if not isinstance(quantizer, LearnedQuantizer) else FixedQuantizer(4)
    names = rf"holds a {type(other).__name__} .* quantizes with a {type(quantizer).__name__}"
    with pytest.raises(CheckpointError, match=names):
        quantizer.load_state_dict(other.state_dict())


@every
def test_single_numbers_stay_single_and_others_take_the_shape_of_what_is_loaded(make: Maker) -> None:
    quantizer = make(4)
    state = quantizer.state_dict()
    names = [name for name, _ in quantizer.named_buffers()]
    state.update({name: torch.ones(5) for name in names})
    if quantizer.scalar_state:
        with pytest.raises(CheckpointError, match=r"size mismatch .* has \(5,\), this \w+ a single number"):
            quantizer.load_state_dict(state)
    else:
        quantizer.load_state_dict(state)
        assert all(buffer.shape == (5,) for buffer in quantizer.buffers())


@every
@pytest.mark.parametrize("version", [1, 3, 99])
def test_a_state_of_an_unknown_version_is_refused(make: Maker, version: int) -> None:
    state = make(4).get_extra_state()
    state[0] = version
    with pytest.raises(CheckpointError, match=f"version {version} .* reads version {FORMAT_VERSION}: load it with"):
        quantizer_of_state(state)


def test_a_state_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"kind 98, .* does not know: load it with .* kind=98 first"):
        quantizer_of_state(torch.tensor([FORMAT_VERSION, 98, 4]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_where_the_table_says(kind: int) -> None:
    home, _, name = KINDS[kind].partition(":")
    assert getattr(import_module(home), name).kind == kind


def test_a_kind_is_taken_once() -> None:
    with pytest.raises(
        ConfigurationError, match=r"kind=2 of Mine is taken by lightning_quant\.quantizers\.fixed:FixedQuantizer"
    ):

        class Mine(Quantizer, kind=2):
            pass


def test_a_subclass_without_a_kind_is_written_as_its_parent() -> None:
    class Mine(FixedQuantizer):
        pass

    quantizer = started(Mine)
    assert read_state(quantizer.get_extra_state())[0] == FixedQuantizer.kind
    assert type(quantizer_of_state(quantizer.get_extra_state())) is FixedQuantizer


@every
def test_bits_out_of_range_are_refused(make: Maker) -> None:
    with pytest.raises(ConfigurationError, match="bits=17: expected a whole number from 2 to 16"):
        make(17)


@every
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_state_stays_fp32_and_codes_stay_whole(make: Maker, cast: str) -> None:
    quantizer = started(make)
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    getattr(quantizer, cast)()
    quantizer.to(torch.float64).to(torch.bfloat16)
    assert before
    for name, buffer in quantizer.named_buffers():
        assert buffer.dtype == {"codes": torch.uint8, "fingerprint": torch.int64}.get(name, torch.float32)
        assert torch.equal(buffer, before[name])


@every
def test_moving_to_the_device_where_it_is_keeps_the_tensors_that_an_optimizer_holds(make: Maker) -> None:
    quantizer = started(make)
    before = dict(quantizer.named_buffers())
    quantizer.to("cpu").half().float()
    assert all(buffer is before[name] for name, buffer in quantizer.named_buffers())


@every
def test_no_parameters_for_other_optimizers_to_find(make: Maker) -> None:
    assert not list(started(make).parameters())


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_copies_behave_alike_and_share_nothing(make: Maker, clone: Callable[[Quantizer], Quantizer]) -> None:
    quantizer = started(make)
    copied = clone(quantizer)
    assert torch.equal(output(copied, sample(1)), output(quantizer, sample(1)))
    for ours, theirs in zip(quantizer.buffers(), copied.buffers(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()
        assert ours.requires_grad == theirs.requires_grad


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_starts_it(make: Maker, value: float) -> None:
    quantizer, x = make(4), sample()
    x[3, 3] = value
    quantizer.initialize(x.abs() if isinstance(quantizer, GradientQuantizer) else x)
    assert not is_ready(quantizer)
    quantizer.initialize(sample().abs() if isinstance(quantizer, GradientQuantizer) else sample())
    assert quantizer.ready
    assert torch.equal(output(quantizer, sample(1)), output(started(make), sample(1)))


@of_any_tensor
def test_nan_passes_through_and_does_not_change_the_range(make: Maker) -> None:
    quantizer, x = started(make), sample()
    before = [buffer.clone() for buffer in quantizer.buffers()]
    x[3, 3] = float("nan")
    assert output(quantizer, x)[3, 3].isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.buffers(), strict=True))


@every
def test_all_zeros_leave_it_waiting(make: Maker) -> None:
    quantizer = make(4)
    quantizer.initialize(torch.zeros(8, 6))
    assert not is_ready(quantizer)
    assert output(quantizer, torch.zeros(8, 6)).eq(0).all()


@nearest
def test_the_identity_before_it_is_ready(make: Maker) -> None:
    assert torch.equal(output(make(4), sample()), sample())


@every
def test_the_input_is_not_written_to(make: Maker) -> None:
    quantizer, x = started(make), sample(1)
    output(quantizer, x)
    assert torch.equal(x, sample(1))


@every
def test_it_says_its_bits_and_whether_it_is_ready(make: Maker) -> None:
    assert "bits=4, ready=False" in repr(make(4))
    assert "bits=4, ready=True" in repr(started(make))


def test_a_network_with_quantizers_is_not_scripted() -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    swap(network[0][0], weight_quantizer=FixedQuantizer(4))  # type: ignore[index, arg-type]
    with pytest.raises(UnsupportedModelError, match=r"torch\.jit\.script does not support .*FixedQuantizer: .*strip"):
        torch.jit.script(network)
    torch.jit.script(strip(network))
