"""Codes kept for each weight, and learned."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_quant import load_quantized, save_quantized
from lightning_quant.errors import QuantizationError
from lightning_quant.functional.rounding import soft_rounding
from lightning_quant.nn import strip, swap
from lightning_quant.quantizers import FixedQuantizer, RoundedQuantizer

kinds = pytest.mark.parametrize(
    ("symmetric", "axis"), [(False, 0), (False, None), (True, 0), (True, None), (False, 1), (True, -1)]
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, bits: int = 4, symmetric: bool = False, axis: int | None = 0) -> RoundedQuantizer:
    quantizer = RoundedQuantizer(bits, symmetric, axis)
    quantizer.initialize(weight)
    return quantizer


def steps(quantizer: RoundedQuantizer, weight: Tensor) -> Tensor:
    """Where the quantized weights stand, in steps from the weights."""
    moved: Tensor = quantizer(weight).detach()
    return (moved - weight) / quantizer.affine(weight.dim())[0]


@kinds
@pytest.mark.parametrize("bits", [2, 4, 8, 9, 16])
def test_the_nearest_codes_are_those_of_a_fixed_quantizer(symmetric: bool, axis: int | None, bits: int) -> None:
    weight, fixed = normal(5, 6), FixedQuantizer(bits, symmetric, axis)
    fixed.initialize(weight)
    quantizer = rounded(weight, bits, symmetric, axis)
    assert torch.equal(quantizer(weight), fixed(weight))
    assert quantizer.codes.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert (quantizer.signed_codes >= quantizer.grid.low).all()
    assert (quantizer.signed_codes <= quantizer.grid.high).all()


@kinds
def test_learning_starts_from_the_codes_as_they_are(symmetric: bool, axis: int | None) -> None:
    weight = normal(5, 6)
    quantizer = rounded(weight, 4, symmetric, axis)
    before = quantizer(weight)
    quantizer.begin(weight)
    torch.testing.assert_close(quantizer(weight).detach(), before, rtol=1e-5, atol=1e-6)
    quantizer.cancel()
    assert torch.equal(quantizer(weight), before)
    quantizer.begin(weight)
    codes = quantizer.codes.clone()
    quantizer.end()
    assert torch.equal(quantizer.codes, codes)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.integers(2, 8), st.booleans(), st.floats(-0.7, 0.7))
def test_codes_that_were_learned_are_where_learning_starts_again(
    seed: int, bits: int, symmetric: bool, moved: float
) -> None:
    """Also where a learned scale has moved the weights by more than a step from their codes."""
    weight = normal(4, 9, seed=seed)
    quantizer = rounded(weight, bits, symmetric)
    leaves = quantizer.begin(weight)
    with torch.no_grad():
        leaves["alpha"].add_(normal(4, 9, seed=seed + 1))
        leaves["log_ratio"].add_(moved)
    quantizer.end()
    codes, values = quantizer.codes.clone(), quantizer(weight)
    quantizer.begin(weight)
    torch.testing.assert_close(quantizer(weight).detach(), values, rtol=1e-5, atol=1e-6)
    quantizer.end()
    assert torch.equal(quantizer.codes, codes)


@kinds
def test_the_variable_decides_between_below_and_above(symmetric: bool, axis: int | None) -> None:
    weight = normal(5, 6)
    quantizer = rounded(weight, 8, symmetric, axis)
    for sign in (-1, 1):
        with torch.no_grad():
            quantizer.begin(weight)["alpha"].fill_(3.0 * sign)
        learned = quantizer(weight).detach()
        quantizer.end()
        torch.testing.assert_close(quantizer(weight), learned, rtol=1e-6, atol=1e-7)
        # One step is lost at the ends of the range.
        position = steps(quantizer, weight) * sign
        assert (position.abs() <= 1 + 1e-3).all()
        assert (position >= -1e-3).double().mean() > 0.8


def test_a_kept_code_is_not_changed_by_the_dtype_of_the_weight() -> None:
    weight = normal(5, 6)
    quantizer = rounded(weight, 8)
    assert torch.equal(quantizer(weight.bfloat16()), quantizer(weight).bfloat16())


def test_a_weight_that_was_rounded_against_its_fraction_starts_at_the_margin() -> None:
    weight = normal(3, 40)
    quantizer = rounded(weight)
    nearest = quantizer.begin(weight)["alpha"].detach().clone()
    with torch.no_grad():
        quantizer.begin(weight)["alpha"].mul_(-1)
    quantizer.end()
    alpha = quantizer.begin(weight, margin=0.25)["alpha"].detach()
    turned = (alpha >= 0) != (nearest >= 0)
    assert turned.double().mean() > 0.9
    assert set(alpha[turned].abs().tolist()) == {0.25}


@pytest.mark.parametrize("soft", [True, False])
def test_gradients_are_those_of_the_soft_rounding(soft: bool) -> None:
    """d w / d alpha = scale h'(alpha), d w / d log_ratio = w, by autograd in FP64 over the formula."""
    weight, weights = normal(3, 8), normal(3, 8, seed=1)
    quantizer = rounded(weight, 6)
    leaves = quantizer.begin(weight, soft=soft)
    (quantizer(weight) * weights).sum().backward()
    scale, zero_point = quantizer.scale.double()[:, None], quantizer.zero_point.double()[:, None]
    alpha = leaves["alpha"].detach().double().requires_grad_()
    log_scale = scale.log().requires_grad_()
    base = (weight.double() / scale).floor() + zero_point
    h = soft_rounding(alpha)
    up = h if soft else (alpha >= 0).double() + (h - h.detach())
    codes = (base + up).clamp(0, 63)
    ((codes - zero_point) * log_scale.exp() * weights).sum().backward()
    for name, slow in (("alpha", alpha), ("log_ratio", log_scale)):
        assert slow.grad is not None
        assert leaves[name].grad is not None
        assert slow.grad.abs().max() > 1e-3
        torch.testing.assert_close(leaves[name].grad.double(), slow.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_what_is_held_gives_the_same_gradients_once_it_is_released() -> None:
    weight, inputs = normal(3, 8), normal(5, 4, 8, seed=1)
    found = []
    for holds in (False, True):
        quantizer = rounded(weight)
        leaves = quantizer.begin(weight)
        quantizer.holds = holds
        for x in inputs:
            (x @ quantizer(weight).T).square().sum().backward()
        assert (leaves["alpha"].grad is None) == holds
        quantizer.release()
        found.append([leaf.grad for leaf in leaves.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_held_is_computed_once_until_a_variable_moves() -> None:
    weight = normal(3, 8)
    quantizer = rounded(weight)
    leaves = quantizer.begin(weight)
    quantizer.holds = True
    with torch.no_grad():
        first = quantizer(weight)
    assert quantizer(weight) is first
    assert first.requires_grad
    before = first.detach().clone()
    with torch.no_grad():
        leaves["alpha"].fill_(-3)
    assert not torch.equal(quantizer(weight), before)
    quantizer.end()
    assert torch.equal(quantizer(weight), rounded_down(weight, quantizer))


def rounded_down(weight: Tensor, quantizer: RoundedQuantizer) -> Tensor:
    scale, zero_point = quantizer.affine(weight.dim())
    start = rounded(weight).affine(2)[0]
    return (((weight / start).floor() + zero_point).clamp(0, 15) - zero_point) * scale  # type: ignore[operator]


def test_a_layer_in_evaluation_sees_new_codes() -> None:
    layer = torch.nn.Linear(8, 3)
    quantizer = rounded(layer.weight)
    swap(layer, None, quantizer)
    x = normal(2, 8)
    with torch.no_grad():
        before = layer(x)
        quantizer.begin(layer.weight)["alpha"].mul_(-1)
        learned = layer(x)
        quantizer.end()
        after = layer(x)
        state = quantizer.state_dict()
        quantizer.load_state_dict(rounded(layer.weight).state_dict())
        again = layer(x)
        quantizer.load_state_dict(state)
    torch.testing.assert_close(after, learned, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after, before)
    assert torch.equal(again, before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_middle_of_learning_learns_on_its_own(clone) -> None:  # type: ignore[no-untyped-def]
    weight = normal(3, 8)
    quantizer = rounded(weight)
    leaves = quantizer.begin(weight)
    quantizer.holds = True
    before = quantizer(weight).detach().clone()
    copied = clone(quantizer)
    with torch.no_grad():
        leaves["alpha"].fill_(-3)
    assert copied.learns
    assert torch.equal(copied(weight), before)
    copied.end()
    assert torch.equal(copied.codes, rounded(weight).codes)


def test_learning_before_there_is_a_range_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"call initialize\(weight\) before begin\(weight\)"):
        RoundedQuantizer(4).begin(normal(2, 2))


# -- the weight that the codes are of ----------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Sequential:
    """Two layers whose codes are of their weights."""
    torch.manual_seed(seed)
    found = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)).eval()
    for layer in (found[0], found[2]):
        swap(layer, weight_quantizer=rounded(layer.weight))  # type: ignore[arg-type]
    return found


X = normal(2, 2, 5, 5)
CHANGES: dict[str, Callable[[nn.Conv2d], object]] = {
    "a copy": torch.no_grad()(lambda layer: layer.weight.copy_(layer.weight * 1.001)),
    "a copy into its data": lambda layer: layer.weight.data.copy_(layer.weight.data * 1.001),
    "other data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 1.001),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 1.001)),
    "one number": lambda layer: layer.weight.data.view(-1)[3:4].add_(1e-3),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruning for good": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight"),
    "an adapter": lambda layer: layer.weight.data.add_(1e-3 * torch.ones_like(layer.weight)),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_weight_is_refused(change: Callable[[nn.Module], object], seen: bool, grad: bool) -> None:
    found = network()
    with torch.set_grad_enabled(grad):
        if seen:
            found(X)
        change(found[2])
        with pytest.raises(QuantizationError, match=r"shape \(4, 6, 1, 1\) was changed .*strip\(model\)"):
            found(X)
        if "2.weight" in found.state_dict():
            loaded = network(1)
            loaded.load_state_dict(found.state_dict())
            with pytest.raises(QuantizationError, match=r"shape \(4, 6, 1, 1\) was changed"):
                loaded(X)
    with pytest.raises(QuantizationError, match=r"shape \(4, 6, 1, 1\) was changed"):
        save_quantized(found, "never-written")


def loaded_from(state: dict[str, Tensor]) -> nn.Module:
    found = network(1)
    found.load_state_dict(state)
    return found


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda net: net.half().float(),
    "bfloat16 and double": lambda net: net.bfloat16().double().float(),
    "to": lambda net: net.to("cpu", torch.float64).to(torch.float32),
    "a deep copy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "a state": lambda net: loaded_from(net.state_dict()),
    "a state that is taken as it is": lambda net: (net.load_state_dict(net.state_dict(), assign=True), net)[1],
    "a state of before": lambda net: loaded_from({k: v for k, v in net.state_dict().items() if "fingerprint" not in k}),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
    "training and back": lambda net: net.train().eval(),
    "frozen in training": lambda net: net.requires_grad_(False).train(),
}


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("keep", SAME.values(), ids=SAME.keys())
def test_the_same_weight_in_other_hands_is_not_refused(keep: Callable[[nn.Module], nn.Module], seen: bool) -> None:
    found = network()
    expected = found(X)
    kept = keep(found if seen else network())
    torch.testing.assert_close(kept(X), expected, rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(kept(X), expected, rtol=2e-2, atol=2e-2)
    # And a change after it is noticed.
    kept[2].weight.data.mul_(1.1)  # type: ignore[index, operator, union-attr]
    with pytest.raises(QuantizationError, match="was changed"):
        kept(X)


def test_a_saved_network_is_of_the_weights_that_its_codes_stand_for(tmp_path: Path) -> None:
    found = network()
    loaded = load_quantized(save_quantized(found, tmp_path / "q"), model=strip(network(1)))
    assert torch.equal(loaded(X), found(X))
    with torch.no_grad():
        loaded[2].weight.mul_(1.1)  # type: ignore[index, operator, union-attr]
    with pytest.raises(QuantizationError, match="was changed"):
        loaded(X)


def test_training_weights_that_would_get_no_gradient_is_refused() -> None:
    found = network().train()
    with pytest.raises(QuantizationError, match=r"training mode with gradients.*strip\(model\) first"):
        found(X)
    with torch.no_grad():
        found(X)
    trained = strip(found)
    trained(X).square().mean().backward()
    assert trained[0].weight.grad is not None
