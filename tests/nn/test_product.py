import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_quant.functional import encode, symmetric_grid
from lightning_quant.functional.blocks import SAMPLE, sampled
from lightning_quant.nn import swap
from lightning_quant.nn.operands import Codes
from lightning_quant.quantizers import LearnedQuantizer


class Nearest(nn.Module):
    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.grid = symmetric_grid(bits)

    def quantize(self, gradient: Tensor) -> Codes:
        step = gradient.abs().max().float() / self.grid.high
        return Codes(encode(gradient, step, self.grid), step, self.grid)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(
    kind: str = "linear", bits: int = 4, signed: bool | None = True, execution: Any = "simulated", fan: int = 16
) -> Any:
    torch.manual_seed(0)
    plain = nn.Linear(fan, 8) if kind == "linear" else nn.Conv2d(fan, 8, 3, padding=1)
    swapped: Any = swap(plain, LearnedQuantizer(bits, signed), LearnedQuantizer(bits, True), Nearest(bits), execution)
    swapped.input_quantizer.initialize(sample(kind, fan) if signed else sample(kind, fan).abs())
    swapped.weight_quantizer.initialize(swapped.weight)
    return swapped


def sample(kind: str = "linear", fan: int = 16) -> Tensor:
    return normal(32, fan) if kind == "linear" else normal(4, fan, 6, 6)


def grads(swapped: Any, x: Tensor) -> list[Tensor]:
    tensors = [x, swapped.weight, swapped.bias, swapped.input_quantizer.range, swapped.weight_quantizer.range]
    return [t.grad for t in tensors]


def functional(kind: str) -> Callable[..., Tensor]:
    return F.linear if kind == "linear" else partial(F.conv2d, padding=1)


kinds = pytest.mark.parametrize("kind", ["linear", "conv"])


@kinds
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_gradients_do_not_depend_on_which_others_are_asked_for(kind: str, needed: tuple[bool, ...]) -> None:
    if not any(needed):
        needed = (False, False, True)
    results = []
    for flags in ((True, True, True), needed):
        swapped, x = layer(kind), sample(kind)
        for tensor, flag in zip((x, swapped.weight, swapped.bias), flags, strict=True):
            tensor.requires_grad_(flag)
        torch.autograd.backward(swapped(x).square().sum())
        results.append(grads(swapped, x))
    # The ranges belong to the weight: frozen with it.
    expected = (*needed, needed[1], needed[1])
    for full, alone, flag in zip(*results, expected, strict=True):
        assert (alone is not None) == flag
        if flag:
            torch.testing.assert_close(alone, full, rtol=1e-5, atol=1e-4)


@kinds
@pytest.mark.parametrize("learned", [(True, False), (False, True), (False, False)])
def test_each_range_learns_alone(kind: str, learned: tuple[bool, bool]) -> None:
    both, some = layer(kind), layer(kind)
    some.input_quantizer.range.requires_grad_(learned[0])
    some.weight_quantizer.range.requires_grad_(learned[1])
    x = sample(kind)
    for swapped in (both, some):
        torch.autograd.backward(swapped(x).square().sum())
    for full, alone, flag in zip(grads(both, x)[3:], grads(some, x)[3:], learned, strict=True):
        assert (alone is not None) == flag
        if flag:
            torch.testing.assert_close(alone, full, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@kinds
def test_a_quantizer_that_is_left_out_leaves_its_tensor_in_float(kind: str, missing: tuple[int, ...]) -> None:
    swapped, x = layer(kind), sample(kind).requires_grad_()
    names = ("input_quantizer", "weight_quantizer", "gradient_quantizer")
    quantizers = [None if i in missing else getattr(swapped, name) for i, name in enumerate(names)]
    for index in missing:
        setattr(swapped, names[index], None)
    first, second, third = quantizers
    inputs, weight = (t if q is None else q(t) for q, t in ((first, x), (second, swapped.weight)))
    output = swapped(x)
    function = functional(kind)
    expected = function(inputs.detach().double(), weight.detach().double(), swapped.bias.detach().double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    grad = normal(*output.shape, seed=5)
    torch.autograd.backward(output, grad)
    codes = None if third is None else third.quantize(grad)
    moved = grad if codes is None else codes.values * codes.scale
    a, b = inputs.detach().requires_grad_(), weight.detach().requires_grad_()
    torch.autograd.backward(function(a, b), moved)
    assert a.grad is not None
    assert b.grad is not None
    inside_x = torch.ones_like(x) if first is None else (x.abs() <= first.range.abs())
    inside_w = torch.ones_like(weight) if second is None else (swapped.weight.abs() <= second.range.abs())
    torch.testing.assert_close(x.grad, a.grad * inside_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(swapped.weight.grad, b.grad * inside_w, rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("bits", [4, 8])
def test_under_bf16_autocast_the_output_is_the_product_of_codes_computed_in_fp32(kind: str, bits: int) -> None:
    swapped = layer(kind, bits, signed=True)
    x = sample(kind)
    with torch.autocast("cpu", torch.bfloat16):
        output = swapped(x)
    assert output.dtype == torch.bfloat16
    function = functional(kind)
    expected = function(swapped.input_quantizer(x), swapped.weight_quantizer(swapped.weight), swapped.bias)
    error = (output.float() - expected).abs().max()
    assert error < 0.012 * expected.abs().max()
    # Codes computed in BF16 would be further away than the rounding of the output explains.
    wrong = function(
        swapped.input_quantizer(x.bfloat16()).float(), swapped.weight_quantizer(swapped.weight), swapped.bias
    )
    closer = (output.float() - expected).square().mean() < 0.5 * (output.float() - wrong).square().mean()
    assert closer


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_codes_that_bf16_cannot_hold_are_multiplied_in_fp32(bits: int) -> None:
    swapped, x = layer(bits=bits), sample()
    with torch.autocast("cpu", torch.bfloat16):
        output = swapped(x)
    expected = F.linear(swapped.input_quantizer(x), swapped.weight_quantizer(swapped.weight), swapped.bias)
    exact = bits <= 9  # 255 is below 256
    assert output.dtype == (torch.bfloat16 if exact else torch.float32)
    torch.testing.assert_close(output.float(), expected, rtol=0.02 if exact else 1e-4, atol=0.02 if exact else 1e-4)


@pytest.mark.parametrize("execution", ["simulated", "integer"])
@pytest.mark.parametrize("bits", [4, 7])
def test_fp16_sums_of_codes_do_not_overflow(execution: str, bits: int) -> None:
    fan = 2048
    swapped = layer(bits=bits, signed=None, execution=execution, fan=fan)
    x = sample(fan=fan).abs().requires_grad_()
    swapped.weight.data.abs_()
    with torch.autocast("cpu", torch.float16):
        output = swapped(x)
    expected = F.linear(swapped.input_quantizer(x), swapped.weight_quantizer(swapped.weight), swapped.bias)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), expected, rtol=5e-3, atol=5e-3)
    torch.autograd.backward(output, torch.ones_like(output))
    reference = layer(bits=bits, signed=None, fan=fan)
    reference.weight.data.abs_()
    y = sample(fan=fan).abs().requires_grad_()
    torch.autograd.backward(reference(y), torch.ones(32, 8))
    for name, ours, theirs in zip("xwb", grads(swapped, x), grads(reference, y), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3, msg=name)


@kinds
@pytest.mark.parametrize("bits", [4, 7])
@pytest.mark.parametrize("signed", [True, None])
def test_integer_equals_simulated_to_fp32_rounding(kind: str, bits: int, signed: bool | None) -> None:
    results = []
    for execution in ("simulated", "integer"):
        swapped = layer(kind, bits, signed, execution)
        assert swapped.runs_integer() == (execution == "integer")
        x = (sample(kind) if signed else sample(kind).abs()).requires_grad_()
        output = swapped(x)
        torch.autograd.backward(output, normal(*output.shape, seed=3))
        results.append([output, *grads(swapped, x)])
    for simulated, integer in zip(*results, strict=True):
        torch.testing.assert_close(integer, simulated, rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("execution", ["simulated", "integer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_hidden(kind: str, execution: str, value: float) -> None:
    swapped, x = layer(kind, execution=execution), sample(kind).requires_grad_()
    output = swapped(x)
    grad = normal(*output.shape)
    grad.view(-1)[3] = value
    torch.autograd.backward(output, grad)
    for ours in grads(swapped, x)[:3]:
        assert not ours.isfinite().all()
    if value != value:
        with torch.no_grad():
            x.view(-1)[5] = value
            assert swapped(x).isnan().any()


@kinds
@pytest.mark.parametrize("execution", ["simulated", "integer"])
def test_the_gradient_of_the_output_is_never_written_to(kind: str, execution: str) -> None:
    swapped, x = layer(kind, execution=execution), sample(kind).requires_grad_()
    output = swapped(x)
    grad = normal(*output.shape)
    torch.autograd.backward(output, grad)
    assert torch.equal(grad, normal(*output.shape))
    swapped.gradient_quantizer = None
    torch.autograd.backward(swapped(x), grad)
    assert torch.equal(grad, normal(*output.shape))


def saved_bytes(swapped: Any, x: Tensor, known: list[Tensor]) -> int:
    """Bytes that the layer keeps for backward beside ``known`` tensors, each storage once."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = swapped(x)
    assert output.requires_grad
    known_storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(size for pointer, size in storages.items() if pointer not in known_storages)


SCALARS = 64


@kinds
@pytest.mark.parametrize(("bits", "size"), [(2, 1), (4, 1), (5, 2), (8, 2)])
def test_the_input_is_kept_in_one_byte_a_value_up_to_4_bits(kind: str, bits: int, size: int) -> None:
    swapped, x = layer(kind, bits), sample(kind)
    kept = saved_bytes(swapped, x, [swapped.weight, swapped.bias])
    codes = swapped.weight.numel() + x.numel() * size
    # Beside a sample of the input, of at most 4 KiB.
    assert codes <= kept - sampled(x).nbytes <= codes + SCALARS


@pytest.mark.parametrize("bits", [4, 9])
@kinds
def test_backward_leaves_samples_of_what_the_ranges_are_for(kind: str, bits: int) -> None:
    swapped, x = layer(kind, bits), sample(kind).requires_grad_()
    y = swapped(x)
    assert swapped.input_quantizer.sample is swapped.weight_quantizer.sample is None
    y.sum().backward()
    for quantizer, tensor in ((swapped.input_quantizer, x), (swapped.weight_quantizer, swapped.weight)):
        assert torch.equal(quantizer.sample, sampled(tensor.detach()))
        assert len(quantizer.sample) <= SAMPLE


def test_above_8_bits_the_input_itself_is_kept() -> None:
    swapped, x = layer(bits=9), sample()
    assert saved_bytes(swapped, x, [swapped.weight, swapped.bias, x]) <= 2 * swapped.weight.numel() + SCALARS


@pytest.mark.parametrize("inplace", [False, True])
def test_beside_a_relu_nothing_extra_is_kept(inplace: bool) -> None:
    swapped = layer(signed=None)
    x = F.relu(sample().requires_grad_() * 1.0, inplace=inplace)
    assert saved_bytes(swapped, x, [swapped.weight, swapped.bias, x]) <= swapped.weight.numel() + SCALARS


@pytest.mark.parametrize("bits", [4, 8])
def test_range_gradients_of_packed_inputs_are_known_to_the_residual(bits: int) -> None:
    results = []
    for relu in (True, False):
        swapped = layer(bits=bits, signed=None)
        leaf = sample().abs().requires_grad_()
        torch.autograd.backward(swapped(leaf.relu() if relu else leaf).square().sum())
        results.append((swapped, leaf))
    (exact, x), (packed, _) = results
    levels = 16 if bits == 4 else 128
    assert x.grad is not None
    bound = x.grad.abs().sum() * packed.input_quantizer.scale / packed.input_quantizer.range / (2 * levels)
    difference = (exact.input_quantizer.range.grad - packed.input_quantizer.range.grad).abs()
    assert 0 < difference <= bound + 1e-3


def test_ranges_forget_a_loss_that_was_thrown_away() -> None:
    swapped, fresh, x = layer(), layer(), sample()
    torch.autograd.backward(swapped(x).square().sum() * 100)
    swapped.zero_grad()
    assert swapped.input_quantizer.range.grad is not None
    for module in (swapped, fresh):
        torch.autograd.backward(module(x).square().sum())
    for ours, theirs in zip(grads(swapped, x)[1:], grads(fresh, x)[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_ranges_add_up_over_accumulated_batches() -> None:
    swapped, single, a, b = layer(), layer(), normal(32, 16), normal(32, 16, seed=1)
    torch.autograd.backward(swapped(a).square().sum())
    torch.autograd.backward(swapped(b).square().sum())
    total = [torch.zeros(())] * 2
    for x in (a, b):
        single.zero_grad()
        torch.autograd.backward(single(x).square().sum())
        total = [t + g for t, g in zip(total, grads(single, x)[3:], strict=True)]
    for ours, theirs in zip(grads(swapped, a)[3:], total, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_double_backward_is_refused() -> None:
    swapped, x = layer(), sample().requires_grad_()
    (grad,) = torch.autograd.grad(swapped(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(grad.sum())
