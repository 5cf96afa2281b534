from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from helpers.oracle import quantize_unsigned, quantize_weight, with_gradient
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.functional import Grid, encode, symmetric_grid
from lightning_quant.nn import restore, swap
from lightning_quant.nn.operands import Codes
from lightning_quant.quantizers import FixedQuantizer, LearnedQuantizer

BITS = 4


class NearestGradient(nn.Module):
    """Rounds the gradient to the nearest of 15 codes, for a result that can be computed again."""

    ready = True
    grid = symmetric_grid(BITS)

    def quantize(self, gradient: Tensor) -> Codes:
        step = gradient.abs().max().float() * 0.8 / self.grid.high
        return Codes(encode(gradient, step, self.grid), step, self.grid)


class Result(NamedTuple):
    output: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    input_range: Tensor
    weight_range: Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def quantized(layer: nn.Module, x: Tensor) -> Any:
    swapped = swap(layer, LearnedQuantizer(BITS), LearnedQuantizer(BITS, signed=True), NearestGradient())
    assert swapped.input_quantizer is not None
    assert swapped.weight_quantizer is not None
    swapped.input_quantizer.initialize(x)
    swapped.weight_quantizer.initialize(swapped.weight)
    # Narrow enough for both clamps to act.
    swapped.input_quantizer.range.data.mul_(0.5)  # type: ignore[union-attr, operator]
    swapped.weight_quantizer.range.data.mul_(0.5)  # type: ignore[union-attr, operator]
    return swapped


def run(
    layer: Any, leaf: Tensor, before: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor], *args: Any
) -> Result:
    output = layer(before(leaf), *args)
    torch.autograd.backward(output, gradient(output))
    bias = None if layer.bias is None else grad_of(layer.bias)
    ranges = grad_of(layer.input_quantizer.range), grad_of(layer.weight_quantizer.range)
    return Result(output.detach(), grad_of(leaf), grad_of(layer.weight), bias, *ranges)


def oracle(
    layer: Any, leaf: Tensor, before: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor], *args: Any
) -> Result:
    """The layer's own float forward, in FP64, on tensors that the oracle quantized."""
    x = leaf.detach().double().requires_grad_()
    weight = layer.weight.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    ranges = [q.range.detach().double().requires_grad_() for q in (layer.input_quantizer, layer.weight_quantizer)]
    quantize = quantize_weight if layer.input_quantizer.signed else quantize_unsigned
    tensors = {"weight": quantize_weight(weight, ranges[1], BITS)} | ({} if bias is None else {"bias": bias})
    plain = layer.float_class.__new__(layer.float_class)
    plain.__dict__ = {**layer.__dict__, "_modules": {}}
    y = functional_call(plain, tensors, (quantize(before(x), ranges[0], BITS), *args))
    grad = gradient(y.float())
    codes = NearestGradient().quantize(grad)
    assert codes.scale is not None
    y = with_gradient(y, codes.values.double() * codes.scale.double())
    torch.autograd.backward(y, torch.zeros_like(y))
    return Result(
        y.detach(), grad_of(x), grad_of(weight), None if bias is None else grad_of(bias), *map(grad_of, ranges)
    )


def random_gradient(output: Tensor) -> Tensor:
    return normal(*output.shape, seed=9).to(output.dtype)


def check(
    layer: nn.Module,
    x: Tensor,
    *args: Any,
    before: Callable[[Tensor], Tensor] = lambda x: x,
    gradient: Callable[[Tensor], Tensor] = random_gradient,
) -> None:
    swapped = quantized(layer, before(x.clone()))
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    expected = oracle(swapped, leaf, before, gradient, *args)
    found = run(swapped, leaf, before, gradient, *args)
    for name, ours, theirs in zip(Result._fields, found, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs is None
            continue
        size = theirs.abs().max().item()
        tolerance = 1e-5 * size + 1e-6
        if name == "input_range":
            # Residuals are kept to 1/32 of a step, those too whose gradient a ReLU then drops.
            bound = swapped.input_quantizer.scale.item() / swapped.input_quantizer.range.abs().item() / 32
            tolerance = 3 * bound * expected.x.abs().sum().item() + 1e-4 * size + 1e-4
        if name == "weight_range":
            tolerance = 1e-4 * size + 1e-4
        assert ours.shape == theirs.shape, name
        assert (ours - theirs).abs().max() <= tolerance, name


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6), ()),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6), ()),
    "linear of a sequence": (lambda: nn.Linear(6, 5), (2, 3, 4, 6), ()),
    "linear unbatched": (lambda: nn.Linear(6, 5), (6,), ()),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9), ()),
    "conv1d unbatched": (lambda: nn.Conv1d(3, 4, 3), (3, 9), ()),
    "conv1d circular": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 9), ()),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 7), ()),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 7), ()),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 7), ()),
    "conv2d stride": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 3, 7, 8), ()),
    "conv2d dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=2), (2, 3, 7, 7), ()),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 6, 6), ()),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6), ()),
    "conv2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 6, 7), ()),
    "conv2d replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (2, 3, 6, 7), ()),
    "conv2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 6, 7), ()),
    "conv2d same": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 6, 7), ()),
    "conv2d same, even kernel": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 6, 7), ()),
    "conv2d same, dilated, reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2, padding_mode="reflect"),
        (2, 3, 6, 7),
        (),
    ),
    "conv2d valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 7), ()),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 2, 4, 4, 3), ()),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5), ()),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 5), ()),
    "transposed2d groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 4, 5), ()),
    "transposed2d output size": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (2, 3, 4, 5), ([8, 9],)),
    "transposed2d unbatched": (lambda: nn.ConvTranspose2d(3, 4, 2, bias=False), (3, 4, 5), ()),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3), ()),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("relu", [False, True], ids=["packed", "beside a ReLU"])
def test_equals_the_oracle(name: str, relu: bool) -> None:
    torch.manual_seed(0)
    make, shape, args = CASES[name]
    check(make(), normal(*shape), *args, before=torch.relu if relu else lambda x: x)


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_an_input_from_a_relu_in_place_or_not(relu: nn.Module) -> None:
    check(nn.Conv2d(3, 4, 3), normal(2, 3, 6, 6), before=lambda x: relu(x * 1.0))


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 3, 6, 1)])
def test_channels_last(shape: tuple[int, ...]) -> None:
    x = normal(*shape).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(3, 4, (3, 1)).to(memory_format=torch.channels_last)
    check(layer, x, gradient=lambda y: random_gradient(y).to(memory_format=torch.channels_last))
    check(nn.Conv2d(3, 4, (3, 1)), x)


def test_an_input_that_is_not_contiguous() -> None:
    check(nn.Linear(6, 5), normal(6, 8), before=lambda x: x.t())
    check(nn.Linear(6, 5), normal(8, 12), before=lambda x: x[:, ::2])
    check(nn.Linear(6, 5), normal(1, 6), before=lambda x: x.expand(8, 6))
    check(nn.Conv2d(3, 4, 3), normal(6, 3, 6, 2), before=lambda x: x.permute(3, 1, 2, 0))


def test_a_gradient_that_is_not_contiguous() -> None:
    check(nn.Linear(6, 5), normal(8, 6), gradient=lambda y: random_gradient(y.t()).t())
    check(nn.Linear(6, 5), normal(8, 6), gradient=lambda y: random_gradient(y[:, :1]).expand_as(y))
    check(nn.Conv2d(3, 4, 3), normal(2, 3, 6, 6), gradient=lambda y: random_gradient(y[:1, :, :, :1]).expand_as(y))
    check(nn.Conv2d(3, 4, 3), normal(2, 3, 6, 6), gradient=lambda y: random_gradient(y.transpose(1, 3)).transpose(1, 3))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(3, 4, 3), lambda: nn.ConvTranspose2d(3, 4, 2)]
)
def test_swap_and_restore_keep_identity_parameters_hooks_and_keys(make: Callable[[], nn.Module]) -> None:
    layer, kind, calls = make(), type(make()), []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    keys, parameters, own = list(layer.state_dict()), dict(layer.named_parameters()), set(layer.__dict__)
    swapped = swap(layer, LearnedQuantizer(4), LearnedQuantizer(4, signed=True))
    assert swapped is layer
    assert isinstance(swapped, kind)
    assert set(keys) < set(swapped.state_dict())
    assert all(value is parameters[name] for name, value in swapped.named_parameters())
    swapped(torch.rand(2, 6) if kind is nn.Linear else torch.rand(2, 3, 5, 5))
    assert calls == ["before", "forward"]
    restored = restore(swapped)
    assert restored is layer
    assert type(restored) is kind
    assert list(restored.state_dict()) == keys
    assert set(restored.__dict__) == own
    assert all(value is parameters[name] for name, value in restored.named_parameters())


def test_swap_of_another_class_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="ReLU has no quantized form: expected one of Linear, Conv1d"):
        swap(nn.ReLU())


def test_a_validation_before_training_is_in_float_and_starts_nothing() -> None:
    layer, x = nn.Linear(6, 5), normal(4, 6)
    expected = layer(x)
    swapped = swap(layer, LearnedQuantizer(4), LearnedQuantizer(4, signed=True)).eval()
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), expected.detach())
    assert swapped.input_quantizer is not None
    assert not swapped.input_quantizer.ready
    swapped.train()(x)
    assert swapped.input_quantizer.ready


def test_a_layer_used_twice_adds_up() -> None:
    swapped = quantized(nn.Linear(6, 6), normal(4, 6))
    a, b = normal(4, 6), normal(4, 6, seed=1)
    grads = []
    for inputs in ((a, b), (a,), (b,)):
        swapped.zero_grad()
        torch.autograd.backward(torch.stack([swapped(x).square().sum() for x in inputs]).sum())
        tensors = (swapped.weight, swapped.bias, swapped.input_quantizer.range, swapped.weight_quantizer.range)
        grads.append([grad_of(t).clone() for t in tensors])
    for both, first, second in zip(*grads, strict=True):
        torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv2d same, even kernel", "transposed2d groups", "conv1d"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fixed_quantizers_multiply_what_they_quantized(name: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    make, shape, args = CASES[name]
    layer, x = make(), normal(*shape)
    first, second = FixedQuantizer(8, symmetric), FixedQuantizer(4, symmetric, axis=0)
    first.initialize(x)
    second.initialize(layer.weight)  # type: ignore[arg-type]
    expected = functional_call(layer, {"weight": second(layer.weight)}, (first(x), *args))
    swapped: Any = swap(layer, first, second)
    torch.testing.assert_close(swapped(x, *args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [{"gradient_quantizer": nn.Identity()}, {"execution": "integer"}])
def test_what_fixed_quantizers_cannot_do_is_refused(asked: dict[str, Any]) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="found FixedQuantizer and NoneType"):
        swap(layer, FixedQuantizer(8), None, **asked)
    assert type(layer) is nn.Linear


def test_fixed_quantizers_under_autocast() -> None:
    swapped = swap(nn.Conv2d(3, 4, 3), FixedQuantizer(8), FixedQuantizer(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert swapped(normal(2, 3, 6, 6)).dtype == torch.bfloat16
        assert swapped(normal(2, 3, 6, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("empty", [(0, 6), (2, 0, 6)])
def test_an_empty_batch_goes_through(empty: tuple[int, ...]) -> None:
    swapped = quantized(nn.Linear(6, 5), normal(4, 6))
    assert swapped(torch.zeros(empty)).shape == (*empty[:-1], 5)
    fresh = swap(nn.Linear(6, 5), LearnedQuantizer(4), LearnedQuantizer(4, signed=True))
    assert fresh(torch.zeros(empty)).shape == (*empty[:-1], 5)


def test_grids_say_what_integer_execution_needs() -> None:
    swapped = quantized(nn.Linear(6, 5), normal(4, 6).abs())
    assert swapped.grids() == [Grid(0, 15), Grid(-7, 7), Grid(-7, 7)]
    assert not swapped.runs_integer()
    swapped.execution = "integer"
    assert swapped.runs_integer()
    swapped.input_quantizer.ready = False
    assert not swapped.runs_integer()
