"""What is said of each layer is what a slow computation in float64 says."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.vits import NETWORKS, calibration, finished, images
from lightning_quant.analysis import Recorder, analyze_network, find_causes, quantized_root
from lightning_quant.analysis.layers import LayerAnalysis
from lightning_quant.errors import QuantizationError
from lightning_quant.metrics.tensor_error import TensorError, TensorFigures
from lightning_quant.nn import swap
from lightning_quant.nn.structure import in_float, strip
from lightning_quant.quantizers import FixedQuantizer, LearnedQuantizer
from lightning_quant.quantizers.dynamic import LogQuantizer


def learned(x: Tensor, bits: int = 4) -> LearnedQuantizer:
    quantizer = LearnedQuantizer(bits)
    quantizer.initialize(x)
    return quantizer


def fixed(weight: Tensor, bits: int = 4) -> FixedQuantizer:
    quantizer = FixedQuantizer(bits, axis=0, symmetric=False)
    quantizer.initialize(weight)
    return quantizer


def network() -> Any:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 12), nn.Linear(12, 5))
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        for at in (0, 3, 4):
            layer, seen = net[at], net[:at](x) if at else x
            if at == 3:  # as calibrated ones have them, the others as trained ones
                swap(layer, fixed_input(seen), fixed(layer.weight))
            else:
                swap(layer, learned(seen), learned(layer.weight))
    return net.eval()


def fixed_input(x: Tensor) -> FixedQuantizer:
    quantizer = FixedQuantizer(4, symmetric=False)
    quantizer.initialize(x)
    return quantizer


def recorded(net: nn.Module, x: Tensor, **kwargs: Any) -> Recorder:
    recorder = Recorder(net, **kwargs)
    with torch.no_grad():
        net(x)
    recorder.stop()
    return recorder


def inputs() -> Tensor:
    return torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def alone(net: nn.Module, keep: set[str]) -> Tensor:
    """Outputs of a copy in which only some layers are quantized."""
    other = copy.deepcopy(net)
    for name, layer in other.named_children():
        if name not in keep and hasattr(layer, "weight_quantizer"):
            strip(layer)
    with torch.no_grad():
        output: Tensor = other(inputs()).double()
    return output


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_sensitivities_are_those_of_copies_with_that_layer_alone() -> None:
    net = network()
    analysis = analyze_network(net, recorded(net, inputs()).calls)
    expected, names = alone(net, set()), {"0", "3", "4"}
    assert analysis.error == pytest.approx(apart(alone(net, names), expected), rel=1e-5)
    assert [layer.name for layer in analysis.layers] == ["0", "3", "4"]
    for layer in analysis.layers:
        assert layer.only_quantized == pytest.approx(apart(alone(net, {layer.name}), expected), rel=1e-4)
        assert layer.only_float == pytest.approx(apart(alone(net, names - {layer.name}), expected), rel=1e-4)


def test_figures_of_tensors_are_those_of_float64() -> None:
    net = network()
    analysis = analyze_network(net, recorded(net, inputs()).calls, sensitivity=False)
    for layer, x in zip(analysis.layers, seen_by(net), strict=True):
        module = net.get_submodule(layer.name)
        for slot, tensor, quantizer in (
            ("input", x, module.input_quantizer),
            ("weight", module.weight.detach(), module.weight_quantizer),
        ):
            figures, moved = layer.tensors[slot], quantizer(tensor).detach().double()
            noise = (moved - tensor.double()).square().sum()
            assert figures.sqnr == pytest.approx(10 * math.log10(tensor.double().square().sum() / noise), abs=1e-3)
            assert (figures.low, figures.high) == (float(tensor.min()), float(tensor.max()))
            assert figures.negative == pytest.approx(float((tensor < 0).double().mean()), abs=1e-9)
            scale = quantizer.affine(tensor.dim())[0].double()
            # Rounding alone moves a value by half a step at most.
            clipped = ((moved - tensor.double()).abs() > scale * 0.5001).double().mean()
            assert figures.clipped == pytest.approx(float(clipped), abs=1e-3)


def test_a_layer_of_a_trained_network_is_measured_by_how_far_the_outputs_move_without_its_quantizers() -> None:
    net = network()
    analysis = analyze_network(net, recorded(net, inputs()).calls, trained=True)
    assert (analysis.error, analysis.agreement) == (None, None)
    quantized = alone(net, {"0", "3", "4"})
    for layer in analysis.layers:
        expected = apart(alone(net, {"0", "3", "4"} - {layer.name}), quantized)
        assert (layer.only_quantized, layer.only_float) == (None, None)
        assert layer.moves == layer.cost == pytest.approx(expected, rel=1e-4)


def test_a_float_network_that_is_named_is_compared_with() -> None:
    net = network()

    @contextmanager
    def doubled() -> Iterator[None]:
        with in_float(net), torch.no_grad():
            net[4].weight.mul_(2)
            net[4].bias.mul_(2)
            yield
            net[4].weight.div_(2)
            net[4].bias.div_(2)

    analysis = analyze_network(net, recorded(net, inputs()).calls, trained=True, float_network=doubled)
    expected = 2 * alone(net, set())
    assert analysis.error == pytest.approx(apart(alone(net, {"0", "3", "4"}), expected), rel=1e-5)


def seen_by(net: Any) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        net[at].register_forward_pre_hook(lambda module, args: found.append(args[0].detach())) for at in (0, 3, 4)
    ]
    with torch.no_grad():
        net(inputs())
    for handle in handles:
        handle.remove()
    return found


def test_codes_that_occur_are_counted() -> None:
    quantizer = LearnedQuantizer(3, signed=False)
    quantizer.initialize(torch.ones(4))
    with torch.no_grad():
        quantizer.range.fill_(7.0)
    error = TensorError(quantizer, channel_axis=-1)
    error.update(torch.tensor([0.0, 1.0, 2.0, 2.2]).repeat(32, 1))
    error.update(torch.tensor([[7.4, 9.0, 0.0, 0.0]]))
    found = error.figures()
    assert found is not None
    # 0, 1, 2 and 7 of eight; 9 lies outside.
    assert found.codes_used == 0.5
    assert found.clipped == 1 / (33 * 4)


def test_of_few_values_codes_are_not_counted_and_of_steps_that_grow_neither() -> None:
    few = TensorError(learned(torch.randn(64)), channel_axis=-1)
    few.update(torch.randn(8))
    logarithmic = LogQuantizer(4)
    logarithmic.scale, logarithmic.ready = torch.tensor(1.0), True
    growing = TensorError(logarithmic, channel_axis=-1)
    growing.update(torch.rand(64, 64))
    for error in (few, growing):
        found = error.figures()
        assert found is not None
        assert found.codes_used is None
    assert growing.figures().clipped is None  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_transformer_is_measured_with_its_attentions_and_left_as_it_was(kind: str) -> None:
    make, size, channels = NETWORKS[kind]
    net, x = make(), images(4, size, channels)
    finished(calibration(net, x, groups=2, calibration_images=4, allocate=False))
    with torch.no_grad():
        before = net(x)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    analysis = analyze_network(net, recorded(net, x).calls)
    assert {"query", "key", "value", "softmax"} in [set(layer.tensors) for layer in analysis.layers]
    assert analysis.float_bops is not None
    assert analysis.quantized_bops is not None
    assert analysis.quantized_bops < analysis.float_bops / 16
    assert 0 < (analysis.error or 0) < 1
    with torch.no_grad():
        assert torch.equal(net(x), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_calls_are_kept_with_the_same_chance() -> None:
    counts = torch.zeros(20)
    for seed in range(200):
        layer = nn.Identity()
        recorder = Recorder(layer, images=5, seed=seed)
        for number in range(20):
            layer(torch.tensor([float(number)]))
        recorder.stop()
        assert len(recorder.calls) == 5
        for call in recorder.calls:
            counts[int(call.args[0])] += 1
    # 50 of each are expected, with a standard deviation of about 6.
    assert counts.min() > 25
    assert counts.max() < 75


def test_what_is_recorded_is_a_copy() -> None:
    layer, x = nn.Identity(), torch.ones(2, 2)
    recorder = Recorder(layer)
    layer(x)
    x.zero_()
    assert torch.equal(recorder.calls[0].args[0], torch.ones(2, 2))


def test_the_root_is_the_smallest_module_that_is_called() -> None:
    net = network()
    blocks = nn.ModuleList([net])
    assert quantized_root(nn.ModuleDict({"a": nn.ModuleDict({"b": net})})) == "a.b"
    assert quantized_root(nn.ModuleDict({"a": blocks})) == "a.0"
    assert quantized_root(nn.ModuleDict({"a": nn.ModuleList([net[3], net[4]])})) == ""


def test_without_calls_or_quantizers_it_says_what_to_do() -> None:
    net = network()
    with pytest.raises(QuantizationError, match=r"No call of Sequential, .* was recorded"):
        analyze_network(net, [])
    calls = recorded(net, inputs()).calls
    with pytest.raises(QuantizationError, match="Nothing in Sequential is quantized"):
        analyze_network(strip(net), calls)


CLEAN = TensorFigures(4, -1.0, 1.0, 20.0, 0.0, 1.0, 0.5, True, 2.0)


@pytest.mark.parametrize(
    ("slot", "change", "cause"),
    [
        ("input", {"channel_ratio": 30.0}, "outlier channels, the widest is 30 times"),
        ("input", {"negative": 0.0}, "codes for values below 0, of which there are none"),
        ("input", {"clipped": 0.1}, r"10\.0% of the values are clipped"),
        ("weight", {"codes_used": 0.25}, "75% of the codes are never used"),
        ("input", {"sqnr": 0.4, "codes_used": 0.1}, r"hardly any signal is left \(0 dB\)"),
        ("key", {"sqnr": 5.0}, "signal to noise of 5 dB, low for 4 bits"),
    ],
)
def test_a_figure_that_stands_out_is_a_cause(slot: str, change: dict[str, Any], cause: str) -> None:
    figures = TensorFigures(**{**vars(CLEAN), **change})
    (found,) = find_causes(LayerAnalysis("fc", "Linear", (8, 8), 0, {slot: figures}))
    assert str(found).startswith(f"{slot}: ")
    assert re.search(cause, str(found))


def test_figures_that_are_as_they_should_be_say_nothing() -> None:
    assert not find_causes(LayerAnalysis("fc", "Linear", (8, 8), 0, dict.fromkeys(("input", "weight", "key"), CLEAN)))
