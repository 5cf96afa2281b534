"""Quantized forms of subclasses and of parametrized layers, and float layers made from the class of a quantized one."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, skip_init

from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn import Bits, plan_layers, restore, strip, swap, swap_attention
from lightning_quant.nn.forms import LAYERS, layer_form, obstacle
from lightning_quant.nn.structure import rebuild
from lightning_quant.quantizers import FixedQuantizer, LearnedQuantizer

FOUR = Bits(4, 4)


class Kaiming(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        nn.init.kaiming_normal_(self.weight)


class Named(Kaiming):
    """Of a subclass."""


class DerivedWeight(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        del self._parameters["weight"]
        self.raw = nn.Parameter(torch.randn(outputs, inputs))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.raw - self.raw.mean()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AssertionError(value)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + 1


class OfOwnForward(OwnForward):
    pass


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:  # noqa: A002
        return super()._conv_forward(input, weight * 2, bias)


class OwnCall(nn.Linear):
    def __call__(self, input: Tensor) -> Any:  # noqa: A002
        return super().__call__(input) + 1


def quantized(layer: nn.Module) -> Any:
    return swap(layer, LearnedQuantizer(4), LearnedQuantizer(4, signed=True))


def images(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Kaiming, Named])
def test_a_subclass_that_computes_as_its_base_is_quantized_as_that_and_goes_back(kind: type[Kaiming]) -> None:
    layer, plain = kind(3, 4), nn.Conv2d(3, 4, 3)
    plain.load_state_dict(layer.state_dict())
    swapped: Any = quantized(layer)
    assert kind in type(swapped).__mro__
    assert type(swapped).__name__ == f"Quantized{kind.__name__}"
    assert torch.equal(swapped(images()), quantized(plain)(images()))
    assert type(restore(swapped)) is kind


def test_all_layers_of_a_subclass_share_one_form() -> None:
    assert layer_form(Kaiming) is layer_form(Kaiming)
    assert type(quantized(Kaiming(3, 4))) is layer_form(Kaiming)
    assert layer_form(Named) is not layer_form(Kaiming)


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda layer: saved(layer)],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_of_a_quantized_subclass_are_of_its_form(through: Callable[[Any], Any]) -> None:
    layer = quantized(Kaiming(3, 4))
    expected = layer(images())
    found = through(layer)
    assert type(found) is type(layer)
    assert torch.equal(found(images()), expected)


def saved(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (OwnForward(2, 2), "OwnForward has its own forward"),
        (OfOwnForward(2, 2), "OfOwnForward has its own forward"),
        (OwnConvolution(2, 2, 3), "OwnConvolution has its own forward"),
        (OwnCall(2, 2), "OwnCall has its own forward"),
        (parametrizations.weight_norm(OwnForward(2, 2)), "OwnForward has its own forward"),
        (nn.LazyLinear(2), "LazyLinear is uninitialized"),
        (nn.ReLU(), "ReLU has no quantized form: expected one of Linear"),
        (swap(nn.Linear(2, 2)), "Linear is already quantized"),
    ],
)
def test_what_cannot_be_swapped_says_why(layer: nn.Module, why: str) -> None:
    kind = type(layer)
    assert why in obstacle(layer)
    with pytest.raises(UnsupportedModelError, match=why):
        swap(layer)
    assert type(layer) is kind


def test_a_forward_set_on_the_layer_would_hide_ours() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].forward = lambda x: x  # type: ignore[method-assign]
    plan = plan_layers(network, FOUR, "same")
    assert {layer.name: layer.note for layer in plan.layers} == {"0": "Linear has its own forward", "1": ""}


# -- type(layer)(...) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LAYERS, Kaiming], ids=lambda kind: kind.__name__)
def test_the_class_of_a_quantized_layer_makes_float_layers(kind: Any) -> None:
    arguments = (3, 4) if kind in (nn.Linear, Kaiming) else (3, 4, 3)
    layer = quantized(kind(*arguments))
    made = type(layer)(*arguments)
    assert type(made) is kind
    assert inspect.signature(type(layer)) == inspect.signature(kind)
    x = torch.rand(2, 3) if kind is nn.Linear else torch.rand(2, 3, *[6] * (made.weight.dim() - 2))
    torch.manual_seed(0)
    first = type(layer)(*arguments)(x)
    torch.manual_seed(0)
    assert torch.equal(first, kind(*arguments)(x))


def test_a_layer_can_be_made_without_its_weights() -> None:
    made = skip_init(type(quantized(nn.Conv2d(3, 4, 3))), 3, 4, 3)
    assert type(made) is nn.Conv2d


def test_the_class_of_an_opened_attention_makes_float_ones() -> None:
    vit: Any = timm.create_model("vit_tiny_patch16_224", depth=1)
    layers = [nn.MultiheadAttention(8, 2), vit.blocks[0].attn]
    for layer, arguments in zip(layers, [(8, 2), (8,)], strict=True):
        kind = type(layer)
        assert type(type(swap_attention(layer))(*arguments)) is kind


def test_an_adapter_made_like_the_layer_trains_beside_it() -> None:
    base = quantized(nn.Conv2d(3, 4, 3)).requires_grad_(False)
    down, up = type(base)(3, 2, base.kernel_size), type(base)(2, 4, (1, 1), bias=False)
    output = base(images()) + up(down(images()))
    output.sum().backward()
    assert down.weight.grad is not None
    assert up.weight.grad is not None
    assert base.weight.grad is None


# -- weights that derive from others ----------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


DERIVED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 4, bias=False)),
    "own": lambda: parametrize.register_parametrization(nn.ConvTranspose2d(3, 4, 3), "weight", Doubled()),
    "of a subclass": lambda: parametrizations.weight_norm(Kaiming(3, 4)),
    "property": lambda: DerivedWeight(6, 4),
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5),
    "hook": lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)),
}
every = pytest.mark.parametrize("make", DERIVED.values(), ids=DERIVED.keys())
quiet = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def plain(layer: Any) -> Any:
    """The layer with its weight as a Parameter."""
    made: Any = nn.Linear(6, 4) if isinstance(layer, nn.Linear) else nn.Conv2d(3, 4, 3)
    if isinstance(layer, nn.ConvTranspose2d):
        made = nn.ConvTranspose2d(3, 4, 3)
    made.weight = nn.Parameter(layer.weight.detach().clone())
    made.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    return made


@quiet
@every
def test_gradients_flow_on_to_what_the_weight_derives_from(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make()
    x = torch.rand(5, 6) if isinstance(layer, nn.Linear) else images()
    layer(x)  # A hook derives the weight when it is called.
    twin = quantized(plain(layer))
    sources = {name: p for name, p in layer.named_parameters() if name != "bias"}
    swapped = quantized(layer)
    found, expected = swapped(x), twin(x)
    assert torch.equal(found, expected)
    gradient = torch.randn(found.shape)
    expected.backward(gradient)
    # As the float layer's, for the gradient that the weight gets.
    of_sources = torch.autograd.grad(swapped.weight, list(sources.values()), twin.weight.grad, retain_graph=True)
    found.backward(gradient)
    for source, grad in zip(sources.values(), of_sources, strict=True):
        torch.testing.assert_close(source.grad, grad)
    for slot in ("input_quantizer", "weight_quantizer"):
        torch.testing.assert_close(getattr(swapped, slot).range.grad, getattr(twin, slot).range.grad)


def test_a_forward_in_training_derives_the_weight_once() -> None:
    torch.manual_seed(0)
    layer, twin = parametrizations.spectral_norm(nn.Linear(6, 4)), parametrizations.spectral_norm(nn.Linear(6, 4))
    twin.load_state_dict(layer.state_dict())
    plan_layers(nn.Sequential(layer), FOUR, "same")
    quantized(layer)(torch.rand(2, 6))
    twin(torch.rand(2, 6))
    for name, value in twin.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name]), name


def test_ranges_forget_a_loss_that_was_thrown_away() -> None:
    swapped, x = quantized(parametrizations.weight_norm(nn.Linear(6, 4))), torch.rand(2, 6)
    grads = []
    for _ in range(2):
        swapped(x).sum().backward()
        grads.append(swapped.weight_quantizer.range.grad.clone())
        swapped.zero_grad()
    assert torch.equal(*grads)


@pytest.mark.parametrize("first", ["parametrized", "quantized"])
@pytest.mark.parametrize("undone", ["parametrized", "quantized"])
def test_parametrizing_and_quantizing_come_and_go_in_any_order(first: str, undone: str) -> None:
    layer: Any = Kaiming(3, 4)
    do: dict[str, Callable[[Any], object]] = {"quantized": quantized, "parametrized": parametrizations.weight_norm}
    undo: dict[str, Callable[[Any], object]] = {
        "quantized": restore,
        "parametrized": lambda each: parametrize.remove_parametrizations(each, "weight"),
    }
    expected = layer(images())
    do.pop(first)(layer)
    do.popitem()[1](layer)
    assert type(layer).__name__ == "ParametrizedQuantizedKaiming"
    copy.deepcopy(layer)(images())
    layer(images())
    undo.pop(undone)(layer)
    layer(images())
    undo.popitem()[1](layer)
    assert type(layer) is Kaiming
    torch.testing.assert_close(layer(images()), expected)


@pytest.mark.parametrize("make", [lambda: Kaiming(3, 4), DERIVED["weight norm"], DERIVED["own"]])
def test_a_state_dict_rebuilds_them(make: Callable[[], nn.Module]) -> None:
    model, other = nn.Sequential(make()), nn.Sequential(make())
    kind = type(other[0]).__name__
    weight: Any = model[0].weight
    quantizers = FixedQuantizer(8), FixedQuantizer(4)
    for quantizer, tensor in zip(quantizers, (images(), weight), strict=True):
        quantizer.initialize(tensor)
    swap(model[0], *quantizers)
    rebuild(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))
    strip(other)
    assert type(other[0]).__name__ == kind


@pytest.mark.parametrize("strict", [True, False])
def test_float_weights_of_a_parametrized_layer_start_its_ranges(strict: bool) -> None:
    layer, other = (parametrizations.weight_norm(nn.Linear(6, 4)) for _ in range(2))
    quantized(layer)(torch.rand(2, 6))
    layer.load_state_dict(other.state_dict(), strict=strict)
    assert not layer.weight_quantizer.ready
    assert torch.equal(layer.weight, other.weight)
