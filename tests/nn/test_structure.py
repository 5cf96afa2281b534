"""Structure that is written with the weights and rebuilt from them, for all kinds of quantizers."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.nn import strip, swap, swap_attention, swapped_attentions
from lightning_quant.nn.layers import QUANTIZERS
from lightning_quant.nn.structure import is_quantized, mark, quantized_layers, quantizers_of, rebuild
from lightning_quant.quantizers import FixedQuantizer, LearnedQuantizer, Quantizer
from lightning_quant.quantizers.dynamic import TokenQuantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer

Maker = Callable[[], nn.Module]
Parents = dict[str, str | None]


def started(quantizer: FixedQuantizer | LearnedQuantizer, x: Tensor) -> Quantizer:
    quantizer.initialize(x)
    assert quantizer.ready
    return quantizer


def grouped(groups: int = 2) -> GroupQuantizer:
    quantizer = GroupQuantizer(6, groups)
    quantizer.set_ranges(torch.linspace(-4, 4, 2 * groups).view(groups, 2).sort(dim=1).values)
    return quantizer


def rows(groups: int = 3) -> RowGroupQuantizer:
    quantizer = RowGroupQuantizer(6, groups)
    quantizer.set_ranges(torch.linspace(0.2, 1, groups))
    return quantizer


def weight_quantizer(layer: nn.Module) -> Quantizer:
    assert isinstance(layer.weight, Tensor)
    return started(FixedQuantizer(4, symmetric=False, axis=0), layer.weight)


def quantize(model: nn.Module, parents: Parents) -> nn.Module:
    """All attentions opened, then all linears given one of several kinds of input quantizers."""
    for name, parent in parents.items():
        x = torch.linspace(-3, 3, 50)
        query, key, value = (started(FixedQuantizer(6, symmetric=False), x) for _ in range(3))
        above = None if parent is None else model.get_submodule(parent)
        swap_attention(model.get_submodule(name), query, key, value, rows(), parent=above)
    inputs: list[Callable[[], Quantizer | None]] = [grouped, lambda: TokenQuantizer(8), lambda: None]
    linears = [module for module in model.modules() if type(module).__name__.endswith("Linear")]
    for i, layer in enumerate(linears):
        swap(layer, inputs[i % 3](), weight_quantizer(layer))
    return model.eval()


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        depths=(2, 1),
        embed_dim=24,
        num_heads=(2, 4),
        num_classes=3,
    ).eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 8, stride=8),
        nn.Flatten(2),
        nn.Unflatten(1, (16,)),
        Transposed(),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    ).eval()


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


NETWORKS: dict[str, tuple[Maker, Parents]] = {
    "vit": (vit, {"blocks.0.attn": None, "blocks.1.attn": None}),
    "swin": (
        swin,
        {
            f"layers.{stage}.blocks.{i}.attn": f"layers.{stage}.blocks.{i}"
            for stage, depth in enumerate((2, 1))
            for i in range(depth)
        },
    ),
    "packed projection": (encoder, {"4.self_attn": None}),
}
every = pytest.mark.parametrize(("make", "attentions"), NETWORKS.values(), ids=NETWORKS.keys())


@every
def test_a_float_network_takes_structure_and_outputs_of_a_quantized_one(make: Maker, attentions: Parents) -> None:
    torch.manual_seed(0)
    model = quantize(make(), attentions)
    torch.manual_seed(1)
    other = make()
    rebuild(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(x), model(x))
    assert {name: repr(q) for name, q in quantizers_of(other)} == {name: repr(q) for name, q in quantizers_of(model)}
    assert dict(swapped_attentions(other)).keys() == attentions.keys()


@every
def test_stripping_what_was_rebuilt_gives_the_float_network(make: Maker, attentions: Parents) -> None:
    plain = make()
    state = copy.deepcopy(plain.state_dict())
    model = make()
    rebuild(model, quantize(copy.deepcopy(plain), attentions).state_dict())
    model.load_state_dict(state)
    strip(model)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), plain(x))
    assert not is_quantized(model)


def test_an_attention_opened_without_quantizers_is_told_by_its_layer() -> None:
    model, other = encoder(), encoder()
    swap_attention(model.get_submodule("4.self_attn"))
    assert is_quantized(model)
    rebuild(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert [name for name, _ in swapped_attentions(other)] == ["4.self_attn"]


def test_attentions_can_be_opened_by_name() -> None:
    model = vit()
    rebuild(model, vit().state_dict(), opened=["blocks.1.attn"])
    assert [name for name, _ in swapped_attentions(model)] == ["blocks.1.attn"]


def test_a_float_state_changes_nothing() -> None:
    model = vit()
    rebuild(model, vit().state_dict())
    assert not is_quantized(model)


def test_a_quantized_module_is_left_as_it_is() -> None:
    model = quantize(vit(), {})
    rebuild(model, quantize(vit(), {"blocks.0.attn": None}).state_dict())
    assert not list(swapped_attentions(model))


def test_a_shared_layer_is_rebuilt_once_and_loaded_under_each_name() -> None:
    def network() -> nn.Sequential:
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.ReLU(), shared)

    model, other = network(), network()
    swap(model[0], None, weight_quantizer(model[0]))
    rebuild(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert other[0] is other[2]
    assert [name for name, _ in quantized_layers(other)] == ["0"]
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("missing", ["blocks.1.attn", "blocks.1.mlp.fc1"])
def test_what_the_network_does_not_have_is_named(missing: str) -> None:
    model = vit()
    if missing.endswith("attn"):
        swap_attention(model.get_submodule(missing), softmax_quantizer=rows())
    else:
        swap(model.get_submodule(missing), None, FixedQuantizer(4))
    shallow = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(CheckpointError, match=rf"quantizes '{missing}' .* VisionTransformer does not have"):
        rebuild(shallow, model.state_dict())


def test_a_quantized_module_loads_a_quantized_state_with_a_mark_and_stays_strict() -> None:
    model, other = quantize(vit(), {}), quantize(vit(), {})
    state = model.state_dict()
    mark(state, "IGQViT")
    other.load_state_dict(state)
    del state["blocks.0.mlp.fc1.weight_quantizer.scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.mlp\.fc1\.weight_quantizer\.scale"):
        other.load_state_dict(state)


def test_a_float_module_says_what_to_do_with_a_marked_state() -> None:
    state = quantize(vit(), {}).state_dict()
    mark(state, "IGQViT")
    with pytest.raises(RuntimeError, match=r"add IGQViT to the Trainer's callbacks, or load it with lightning_quant"):
        vit().load_state_dict(state)


@every
def test_a_float_state_leaves_ranges_to_be_found(make: Maker, attentions: Parents) -> None:
    model = quantize(make(), attentions)
    model.load_state_dict(make().state_dict())
    ready = {type(quantizer).__name__: quantizer.ready for _, quantizer in quantizers_of(model)}
    expected = {"FixedQuantizer": False, "GroupQuantizer": False, "RowGroupQuantizer": False, "TokenQuantizer": True}
    assert ready == expected


def test_the_three_slots_of_a_layer_keep_their_own_quantizers() -> None:
    layer = swap(nn.Linear(4, 4), LearnedQuantizer(5), LearnedQuantizer(3, signed=True))
    model, other = nn.Sequential(layer), nn.Sequential(nn.Linear(4, 4))
    rebuild(other, model.state_dict())
    rebuilt = [getattr(other[0], slot) for slot in QUANTIZERS]
    assert [(q.bits, q.decides_sign) for q in rebuilt[:2]] == [(5, True), (3, False)]
    assert rebuilt[2] is None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), nn.Flatten(), nn.Linear(100, 2)
    )


def quantized() -> nn.Sequential:
    module = network()
    for layer in map(module.get_submodule, ("0", "2.0", "4")):
        swap(layer, LearnedQuantizer(4), LearnedQuantizer(4, signed=True))
    return module


def test_gives_the_float_network_back() -> None:
    plain, module = network(), quantized()
    x = torch.rand(2, 3, 6, 6)
    assert not torch.equal(module(x), plain(x))
    assert strip(module) is module
    assert torch.equal(module(x), plain(x))
    assert [type(child) for child in module.modules()] == [type(child) for child in plain.modules()]
    assert list(module.state_dict()) == list(plain.state_dict())
    assert repr(module) == repr(plain)


def test_keeps_the_weights_that_were_trained_and_their_identity() -> None:
    module = quantized()
    weights = list(module.parameters())
    module(torch.rand(2, 3, 6, 6)).sum().backward()
    torch.optim.SGD(weights, 0.1).step()
    trained = [weight.clone() for weight in weights]
    assert all(a is b for a, b in zip(strip(module).parameters(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trained, strict=True))
    assert not torch.equal(weights[0], next(network().parameters()))


def test_strip_twice_and_strip_of_a_float_network_change_nothing() -> None:
    plain = network()
    expected = copy.deepcopy(plain.state_dict())
    for module in (strip(plain), strip(strip(quantized()))):
        assert list(module.state_dict()) == list(expected)


def test_quantized_layers_are_listed_once() -> None:
    module = quantized()
    assert [name for name, _ in quantized_layers(nn.ModuleList([module, module]))] == ["0.0", "0.2.0", "0.4"]


def test_a_single_layer_is_stripped_too() -> None:
    layer = nn.Linear(2, 2)
    swap(layer, LearnedQuantizer(4))
    assert type(strip(layer)) is nn.Linear
