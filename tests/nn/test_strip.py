import copy

import torch
from torch import nn

from lightning_quant.nn import strip, swap
from lightning_quant.nn.strip import quantized_layers
from lightning_quant.quantizers import LearnedQuantizer


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
