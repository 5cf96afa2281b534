import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from timm.models import swin_transformer
from torch import Tensor, nn

from helpers.attentions import NETWORKS, Direct, Distort, Seen, error, network, open_all
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.nn import (
    ATTENTIONS,
    SLOTS,
    QuantizedAttention,
    WindowedAttention,
    attention_form,
    register_attention,
    restore_attention,
    strip,
    swap,
    swap_attention,
    swapped_attentions,
)
from lightning_quant.quantizers import FixedQuantizer


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_an_opened_network_computes_what_the_closed_one_does(name: str) -> None:
    module, x = network(name)
    expected = module(x)
    opened = open_all(module)
    assert len(opened) >= 2
    assert expected.abs().max() > 0.1
    assert error(module(x), expected) <= 1e-5
    assert [attention for _, attention in swapped_attentions(module)] == opened


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_closed_network(name: str) -> None:
    module, x = network(name)
    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    open_all(module)
    (found,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    assert error(found, expected) <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_closing_gives_the_module_back(name: str) -> None:
    module, x = network(name)
    expected = module(x)
    kinds = [type(child) for child in module.modules()]
    # Attributes at all depths; a set of hooks compares by its content.
    state = {n: dict(vars(child)) for n, child in module.named_modules()}
    state = {n: {k: dict(v) if isinstance(v, dict) else v for k, v in own.items()} for n, own in state.items()}
    keys, parameters = list(module.state_dict()), dict(module.named_parameters())
    for attention in open_all(module, Distort):
        attention.observer = Seen()
    assert error(module(x), expected) > 1e-4
    for _, attention in list(swapped_attentions(module)):
        assert restore_attention(attention) is attention
    assert torch.equal(module(x), expected)
    assert [type(child) for child in module.modules()] == kinds
    assert list(module.state_dict()) == keys
    assert list(dict(module.named_parameters())) == list(parameters)
    assert all(value is parameters[key] for key, value in module.named_parameters())
    for n, child in module.named_modules():
        assert vars(child).keys() == state[n].keys(), n
        assert all(dict(v) == state[n][k] for k, v in vars(child).items() if isinstance(v, dict)), n
        assert all(v == state[n][k] for k, v in vars(child).items() if isinstance(v, bool)), n


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_strip_closes_attentions_and_restores_their_layers(name: str) -> None:
    module, x = network(name)
    expected, keys = module(x), list(module.state_dict())
    for attention in open_all(module, Distort):
        for layer in [child for child in attention.modules() if isinstance(child, nn.Linear)]:
            swap(layer, FixedQuantizer(4), FixedQuantizer(4))
    assert strip(module) is module
    assert torch.equal(module(x), expected)
    assert list(module.state_dict()) == keys


def copies(module: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_copies_are_open_and_close_on_their_own(name: str) -> None:
    module, x = network(name)
    closed = module(x)
    open_all(module, lambda: FixedQuantizer(4))
    expected = module(x)
    for other in copies(module):
        pairs = list(zip(swapped_attentions(module), swapped_attentions(other), strict=True))
        assert all(type(a) is type(b) and a is not b for (_, a), (_, b) in pairs)
        assert torch.equal(other(x), expected)
        strip(other)
        assert error(other(x), closed) <= 1e-5
        assert not any(child._forward_pre_hooks for child in other.modules())
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", ["timm vit_tiny", "timm swin", "torchvision vit", "torchvision swin v2"])
@torch.no_grad()
def test_the_state_dict_carries_quantizers_from_one_opened_network_to_another(name: str) -> None:
    def opened() -> tuple[nn.Module, Tensor]:
        module, x = network(name)
        open_all(module, lambda: FixedQuantizer(4))
        return module, x

    (first, x), (second, _) = opened(), opened()
    for attention in (attention for _, attention in swapped_attentions(first)):
        for slot in SLOTS:
            cast(FixedQuantizer, getattr(attention, slot)).initialize(torch.linspace(-1, 1, 9))
    for parameter in second.parameters():
        parameter.zero_()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x))


@torch.no_grad()
def test_a_form_of_ones_own() -> None:
    class Stepwise(Direct):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            return (query @ key.mT * 0.5).softmax(-1) @ value

    @register_attention(Stepwise)
    class QuantizedStepwise(QuantizedAttention, Stepwise):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            return self.attend(query, key, value, scale=0.5)

    x = torch.randn(1, 2, 4, 4)
    module = Stepwise()
    expected = module(x, x, x)
    opened = swap_attention(module)
    assert type(opened) is QuantizedStepwise
    torch.testing.assert_close(opened(x, x, x), expected)
    assert type(restore_attention(opened)) is Stepwise


class OwnWindows(swin_transformer.WindowAttention):  # type: ignore[misc]
    pass


def test_a_subclass_gets_the_form_of_the_class_it_is_of() -> None:
    assert attention_form(OwnWindows) is None
    register_attention(OwnWindows)
    form = attention_form(OwnWindows)
    assert form is not None
    assert issubclass(form, WindowedAttention)


def test_open_twice_and_close_of_a_closed_one_are_refused() -> None:
    module = swap_attention(nn.MultiheadAttention(4, 1))
    with pytest.raises(ConfigurationError, match=r"MultiheadAttention is already open: .*restore_attention"):
        swap_attention(module)
    restore_attention(module)
    with pytest.raises(ConfigurationError, match="MultiheadAttention is not an opened attention"):
        restore_attention(module)


def test_a_forward_set_on_the_module_would_hide_ours_and_is_refused() -> None:
    module = nn.MultiheadAttention(4, 1)
    vars(module)["forward"] = lambda x: x
    with pytest.raises(UnsupportedModelError, match="forward that was set on the module itself"):
        swap_attention(module)


def test_names_that_the_opened_form_needs_are_refused() -> None:
    module = nn.MultiheadAttention(4, 1)
    module.attend = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="has attend, which is also a name of QuantizedAttention"):
        swap_attention(module)


def test_an_opened_attention_that_is_not_known_any_more_says_so_when_loaded() -> None:
    register_attention(Direct)
    data = pickle.dumps(swap_attention(Direct()))
    del ATTENTIONS[Direct]
    with pytest.raises(UnsupportedModelError, match=r"\.Direct, since this class is not registered: register it"):
        pickle.loads(data)


def test_quantizers_take_device_and_mode_of_the_module() -> None:
    module = nn.MultiheadAttention(4, 1).eval()
    opened = swap_attention(module, FixedQuantizer(4), None, FixedQuantizer(4))
    assert not any(child.training for child in opened.modules())
    assert opened.key_quantizer is None
    assert [name for name, _ in opened.named_children()] == [
        "in_proj",
        "out_proj",
        "query_quantizer",
        "value_quantizer",
    ]
