"""A calibration step by step: what each step does, and that a stopped one goes on to the same end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant import strip
from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError, UnsupportedModelError
from lightning_quant.functional.groups import channel_ranges, quantize_channels
from lightning_quant.igq_vit.clustering import kmeans
from lightning_quant.igq_vit.perturbation import Replay, log_posteriors
from lightning_quant.igq_vit.session import INPUT, SOFTMAX
from lightning_quant.quantizers import FixedQuantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer
from vits import calibration, finished, images, swin, vit

NETWORKS = {"vit": (vit, 8, 1), "swin": (swin, 16, 3)}


def evaluate(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = network(x)
    return output


@pytest.mark.parametrize("kind", NETWORKS)
def test_prepared_it_is_the_float_network_still(kind: str) -> None:
    make, size, channels = NETWORKS[kind]
    network, x = make(), images(4, size, channels)
    before = evaluate(network, x)
    calibration(network, x)
    assert (evaluate(network, x) - before).abs().max() < 1e-5


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_row_of_the_table_is_treated(kind: str) -> None:
    make, size, channels = NETWORKS[kind]
    network, x = make(), images(4, size, channels)
    found = finished(calibration(network, x, allocate=False))
    for row in found.source.plan.rows:
        module: Any = network.get_submodule(row.name)
        match row.role:
            case "grouped":
                assert isinstance(module.input_quantizer, GroupQuantizer)
                assert module.input_quantizer.groups == 4
            case "one token" | "patch":
                assert isinstance(module.input_quantizer, FixedQuantizer)
                assert module.input_quantizer.bits == (8 if row.role == "patch" else 4)
            case "attention":
                assert isinstance(module.softmax_quantizer, RowGroupQuantizer)
                for operand in (module.query_quantizer, module.key_quantizer, module.value_quantizer):
                    assert isinstance(operand, FixedQuantizer)
                    assert operand.axis is None
        if row.role in ("grouped", "one token", "patch"):
            assert module.weight_quantizer.scale.shape == (len(module.weight),)
    roles = Counter(row.role for row in found.source.plan.rows)
    assert roles == {"grouped": 8 if kind == "vit" else 17, "one token": 1, "patch": 1, "attention": roles["attention"]}


def test_ranges_come_from_inputs_that_are_quantized_upstream_or_not() -> None:
    x = images(4)
    for sequential in (True, False):
        network = vit()
        layer: Any = network.get_submodule("blocks.1.mlp.fc2")
        inputs: list[Tensor] = []
        layer.register_forward_pre_hook(lambda m, args, kept=inputs: kept.append(args[0]))
        evaluate(network, x)
        in_float = inputs[-1]
        finished(calibration(network, x, allocate=False, sequential=sequential, weight_bits=2, group_ranges="mean"))
        evaluate(network, x)
        quantized = inputs[-1]
        ends = [channel_ranges(each).flatten(0, 1) for each in (quantized, in_float)]
        expected, other = (kmeans(points, 4).centres.float() for points in (ends if sequential else ends[::-1]))
        assert torch.allclose(layer.input_quantizer.centres, expected, atol=1e-4)
        assert not torch.allclose(layer.input_quantizer.centres, other, atol=1e-2)


def test_the_instance_of_a_window_attention_is_the_image() -> None:
    network, x = swin(), images(3, 16, 3)
    finished(calibration(network, x, allocate=False))
    layer: Any = network.get_submodule("layers.0.blocks.1.attn.qkv")
    caught: list[Tensor] = []
    layer.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    evaluate(network, x)
    windows, own = caught[0], layer.input_quantizer
    whole = windows.reshape(3, -1, windows.shape[-1])
    expected = quantize_channels(whole, own.centres, own.scale, own.zero_point, 4).view(windows.shape)
    own.instances = 3
    assert torch.equal(own(windows), expected)
    alone = quantize_channels(windows, own.centres, own.scale, own.zero_point, 4)
    assert not torch.equal(alone, expected)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_replayed_pass_is_a_whole_pass_and_skips_what_came_before(kind: str) -> None:
    make, size, channels = NETWORKS[kind]
    network, x = make(), images(2, size, channels)
    found = calibration(network, x)
    names = [name for name, _ in found.allocated]
    replay = Replay(network, lambda: network(x), names)
    calls: Counter[str] = Counter()
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: calls.update([name]))
    with torch.no_grad():
        whole = network(x)
    calls.clear()
    assert torch.equal(replay.run(names[0]), whole)
    from_start = sum(calls.values())
    calls.clear()
    last = found.source.plan.names("grouped")[-1]
    assert torch.equal(replay.run(last), whole)
    assert sum(calls.values()) <= from_start / 2
    assert calls[last] == 1


def test_a_perturbation_is_that_of_one_quantizer_alone() -> None:
    network, x = vit(), images(6)
    found = calibration(network, x)
    reference = evaluate(network, x).double().log_softmax(1)
    finished(found)
    for slot in (("blocks.0.mlp.fc1", INPUT), ("blocks.1.attn", SOFTMAX)):
        quantizer = found.candidates[slot][2]
        strip(network)
        calibration(network, x)
        setattr(network.get_submodule(slot[0]), slot[1], quantizer)
        changed = evaluate(network, x).double().log_softmax(1)
        expected = F.kl_div(changed, reference, log_target=True, reduction="batchmean")
        assert found.omega[slot][2] == pytest.approx(float(expected), rel=1e-6)


def test_allocation_keeps_the_budget_and_is_not_worse_than_the_same_everywhere() -> None:
    found = finished(calibration(vit(), images(8)))
    slots, costs = found.costs(INPUT)
    used = sum(cost[found.groups[slot]] for slot, cost in zip(slots, costs, strict=True))
    assert used <= sum(cost[4] for cost in costs)
    chosen = sum(found.omega[slot][found.groups[slot]] for slot in slots)
    assert chosen <= sum(found.omega[slot][4] for slot in slots) * (1 + 1e-9)
    rows = [slot for slot in found.groups if slot[1] == SOFTMAX]
    assert sum(found.groups[slot] for slot in rows) <= 4 * len(rows)
    for (name, slot), groups in found.groups.items():
        assert getattr(found.source.network.get_submodule(name), slot).groups == groups


def test_a_budget_in_bit_operations_is_kept() -> None:
    plan = calibration(vit(), images(8)).source.plan
    budget = plan.bops(2).total / 1e9
    found = finished(calibration(vit(), images(8), budget=budget))
    chosen = {name: groups for (name, slot), groups in found.groups.items() if slot == INPUT}
    assert plan.bops(chosen).total <= budget * 1e9
    with pytest.raises(ConfigurationError, match=r"one group in every layer needs .* already: write budget="):
        calibration(vit(), images(8), budget=1e-6)


@pytest.mark.parametrize("stop", [1, 2, 9, 11])
def test_stopped_after_any_step_it_goes_on_to_the_same_network(stop: int) -> None:
    x, fresh = images(4), images(5, seed=9)
    straight = finished(calibration(vit(), x))
    assert straight.total == 12
    first = calibration(vit(), x)
    for _ in range(stop):
        first.step()
    state = {key: value.clone() for key, value in first.state_dict().items()}
    second = calibration(vit(), x)
    second.load_state_dict(state)
    assert second.done == stop
    finished(second)
    assert second.groups == straight.groups
    assert second.omega == straight.omega
    assert torch.equal(evaluate(second.source.network, fresh), evaluate(straight.source.network, fresh))


def test_a_state_of_other_settings_is_refused() -> None:
    first = calibration(vit(), images(4))
    first.step()
    with pytest.raises(CheckpointError, match="calibrate anew"):
        calibration(vit(), images(4), weight_bits=6).load_state_dict(first.state_dict())


@pytest.mark.parametrize("scheme", ["igq", "layer_wise", "per_token", "upper_bound", "repq"])
def test_more_bits_come_nearer_to_float_and_strip_brings_it_back(scheme: str) -> None:
    x, errors = images(8), []
    for bits in (2, 4, 8):
        network = vit()
        before = evaluate(network, x)
        settings = {"scheme": scheme, "weight_bits": bits, "activation_bits": bits, "allocate": False}
        finished(calibration(network, x, **settings))
        errors.append(float((evaluate(network, x) - before).norm() / before.norm()))
        strip(network)
        after = evaluate(network, x)
        if scheme == "repq":
            assert torch.allclose(after, before, atol=1e-4)
        else:
            assert torch.equal(after, before)
    assert errors[0] > errors[1] > errors[2]
    # The top code of RepQ's softmax is 0, and 8 bits of powers of two are no finer near 1 than 4.
    assert errors[2] < (0.3 if scheme == "repq" else 0.05)


def test_groups_are_nearer_to_float_than_one_range() -> None:
    x, errors = images(16), {}
    for name, settings in {
        "one range": {"scheme": "layer_wise"},
        "8 groups": {"groups": 8},
        "own": {"scheme": "upper_bound"},
    }.items():
        network = vit()
        before = evaluate(network, x)
        finished(calibration(network, x, allocate=False, weight_bits=8, **settings))  # type: ignore[arg-type]
        errors[name] = float((evaluate(network, x) - before).norm())
    assert errors["own"] < errors["8 groups"] < errors["one range"]


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_image_does_not_know_its_batch(kind: str) -> None:
    make, size, channels = NETWORKS[kind]
    network = finished(calibration(make(), images(6, size, channels))).source.network
    x = images(6, size, channels, seed=5)
    whole = evaluate(network, x)
    assert torch.equal(torch.cat([evaluate(network, x[i : i + 1]) for i in range(6)]), whole)
    assert torch.equal(torch.cat([evaluate(network, x[:2]), evaluate(network, x[2:])]), whole)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    assert torch.equal(evaluate(network, x[order]), whole[order])


def test_threads_change_nothing_but_rounding() -> None:
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            network = finished(calibration(vit(), images(6))).source.network
            outputs.append(evaluate(network, images(6, seed=4)))
    finally:
        torch.set_num_threads(threads)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_nan_is_told_with_the_layer_it_goes_into() -> None:
    network = vit()
    found = calibration(network, images(4))
    with torch.no_grad():
        layer: Any = network.get_submodule("blocks.0.mlp.fc1")
        layer.weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"go into blocks.0.mlp.fc2 are NaN or infinite"):
        found.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 33}, r"groups=33, but the input of blocks.0.attn.qkv has 32 channels: write groups=32"),
        ({"softmax_groups": 99}, r"softmax_groups=99, but the softmax of blocks.0.attn has 68 rows"),
        ({"exclude": ("nothing*",)}, r"exclude='nothing\*' matches none"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_and_leaves_it_alone(settings: dict[str, Any], message: str) -> None:
    network = vit()
    classes = [type(module) for module in network.modules()]
    with pytest.raises(ConfigurationError, match=message):
        calibration(network, images(4), **settings)
    assert [type(module) for module in network.modules()] == classes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "other"}, "scheme='other': expected one of 'igq'"),
        ({"groups": 0}, "groups=0: expected a whole number of at least 1"),
        ({"weight_bits": 1}, "weight_bits=1"),
        ({"allocate": False, "budget": 3.0}, "budget=3.0: a budget is divided among layers"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        calibration(vit(), images(2), **settings)


def test_a_network_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no attention"):
        calibration(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images(2))


def test_excluded_modules_stay_in_float() -> None:
    network = vit()
    found = finished(calibration(network, images(4), allocate=False, exclude=("blocks.0.attn", "*.fc2")))
    names = found.source.plan.names("grouped", "attention")
    assert names == ["blocks.0.mlp.fc1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert type(network.get_submodule("blocks.0.attn.qkv")) is nn.Linear


def test_posteriors_of_what_tasks_return() -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    pixels = log_posteriors({"out": logits})
    assert pixels.shape == (32, 3)
    assert torch.allclose(pixels.exp().sum(1), torch.ones(32, dtype=torch.float64))
    assert torch.allclose(pixels[5], logits[0, :, 1, 1].log_softmax(0))
    with pytest.raises(ConfigurationError, match=r"found \(2, 1\): write allocate=False"):
        log_posteriors(torch.zeros(2, 1))
