"""One calibration pass: which quantizer each tensor gets, and what the quantized network promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.vits import NETWORKS, calibration, evaluate, finished, images, swin, vit
from lightning_quant import strip
from lightning_quant.errors import QuantizationError, UnsupportedModelError
from lightning_quant.functional.groups import channel_ranges, quantize_channels
from lightning_quant.igq_vit.clustering import kmeans
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.ranges import gram_matrix, weight_range
from lightning_quant.igq_vit.schemes import (
    OPERAND_POWER,
    PATCH_BITS,
    WEIGHT_TAILS,
    fit_input,
    fit_softmax,
    fixed,
    layer_wise,
)
from lightning_quant.nn.attention_mixin import SLOTS
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.quantizers import FixedQuantizer, Quantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, InstanceQuantizer, RowGroupQuantizer
from lightning_quant.utilities.autocast import full_precision


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
            network = finished(calibration(vit(), images(6), allocate=False)).source.network
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


def test_nan_of_a_softmax_is_told_with_its_attention() -> None:
    network = vit()
    found = calibration(network, images(4), exclude=("*.qkv", "*.proj"))
    with torch.no_grad():
        layer: Any = network.get_submodule("blocks.1.attn.qkv")
        layer.weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"go into query of blocks.1.attn are NaN or infinite"):
        found.step()


def seen(network: nn.Module, name: str, slot: str, x: Tensor) -> Tensor:
    """What comes to a slot in a pass of its own."""
    caught: list[Tensor] = []
    module: Any = network.get_submodule(name)
    if slot in SLOTS:
        module.observer = lambda which, tensor: caught.append(tensor) if which == slot else None
        evaluate(network, x)
        module.observer = None
    else:
        handle = module.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
        evaluate(network, x)
        handle.remove()
    return caught[0]


def one_by_one(network: nn.Module, plan: VitPlan, x: Tensor, sequential: bool) -> None:
    """Each tensor fitted in a pass of its own, in the order in which a forward comes to them."""
    settings, pending = plan.settings, []
    blocks = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn", "attn.proj", "mlp.fc1", "mlp.fc2")]
    roles = {row.name: row.role for row in plan.rows}
    for name in ["patch_embed.proj", *blocks, "head"]:
        slots = SLOTS if roles[name] == "attention" else ("input_quantizer", "weight_quantizer")
        module: Any = network.get_submodule(name)
        of_weight = None
        for slot in slots:
            quantizer: Quantizer
            tensor = seen(network, name, slot, x)
            if slot == "weight_quantizer":
                assert of_weight is not None
                quantizer = of_weight
            elif slot in SLOTS[:3]:
                quantizer = layer_wise(tensor, 4, settings, len(x), OPERAND_POWER)
            elif slot == "softmax_quantizer":
                quantizer = fit_softmax(tensor, settings, [4], len(x))[4]
            elif roles[name] == "grouped":
                quantizer = fit_input(tensor, module.weight, settings, [4])[4]
            else:
                quantizer = layer_wise(tensor, PATCH_BITS if roles[name] == "patch" else 4, settings, len(x))
            if slot == "input_quantizer":
                rows = F.unfold(tensor, 2, stride=2).transpose(1, 2) if roles[name] == "patch" else tensor
                low, high = weight_range(module.weight, gram_matrix(rows), 4, WEIGHT_TAILS)
                of_weight = fixed(low, high, 4, 0)
            pending.append((module, slot, quantizer))
            if sequential:
                setattr(module, slot, quantizer)
    for module, slot, quantizer in pending:
        setattr(module, slot, quantizer)


@pytest.mark.parametrize("sequential", [True, False])
def test_one_pass_finds_what_a_pass_for_each_tensor_finds(sequential: bool) -> None:
    x = images(4)
    found, slow = (calibration(vit(), x, allocate=False, sequential=sequential) for _ in range(2))
    finished(found)
    one_by_one(slow.source.network, slow.source.plan, x, sequential)
    state = slow.source.network.state_dict()
    assert found.source.network.state_dict().keys() == state.keys()
    for key, value in found.source.network.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_quantizers_keep_no_count_of_the_images_that_were_calibrated_on() -> None:
    network = finished(calibration(vit(), images(4), allocate=False)).source.network
    grouped = [quantizer for _, quantizer in quantizers_of(network) if isinstance(quantizer, InstanceQuantizer)]
    assert [quantizer.instances for quantizer in grouped] == [None] * 10


@pytest.mark.parametrize("scheme", ["layer_wise", "repq"])
def test_windowed_attention_takes_the_baselines_and_comes_back(scheme: str) -> None:
    network, x = swin(), images(4, 16, 3)
    before = evaluate(network, x)
    finished(calibration(network, x, scheme=scheme))
    assert not torch.allclose(evaluate(network, x), before, atol=1e-3)
    strip(network)
    assert torch.allclose(evaluate(network, x), before, atol=1e-4 if scheme == "repq" else 0.0)


def test_repq_leaves_a_norm_before_a_weight_that_derives_from_others() -> None:
    network, x = vit(), images(4)
    block: Any = network.get_submodule("blocks.0")
    nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    before, norm = evaluate(network, x), block.norm2.weight.clone()
    finished(calibration(network, x, scheme="repq"))
    assert torch.equal(block.norm2.weight, norm)
    assert not torch.equal(block.norm1.weight, norm)
    torch.testing.assert_close(evaluate(strip(network), x), before, atol=1e-4, rtol=0)


def test_repq_of_a_norm_with_two_readers_is_refused_and_leaves_the_weights() -> None:
    class Twice(nn.Module):
        """The output of the first norm goes to the head too."""

        body: Any

        def __init__(self) -> None:
            super().__init__()
            self.body = vit()
            self.kept: list[Tensor] = []
            self.body.blocks[0].norm1.register_forward_hook(lambda m, args, output: self.kept.append(output))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.body(x)
            return logits + self.kept.pop()[:, 0, :10]

    network, x = Twice(), images(4)
    before = evaluate(network, x)
    found = calibration(network, x, scheme="repq")
    with pytest.raises(UnsupportedModelError, match=r"has another consumer: .* The weights are restored"):
        found.step()
    assert torch.equal(evaluate(strip(network), x), before)


def test_ranges_are_fitted_in_fp32_under_autocast_and_any_default() -> None:
    matrix = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.set_default_dtype(torch.float64)
        with full_precision(torch.device("cpu")):
            inside = [(matrix @ matrix).dtype, torch.zeros(1).dtype]
        outside = [(matrix @ matrix).dtype, torch.zeros(1).dtype]
        torch.set_default_dtype(torch.float32)
    assert inside == [torch.float32, torch.float32]
    assert outside == [torch.bfloat16, torch.float64]


def test_under_autocast_the_first_layer_is_calibrated_as_without() -> None:
    x, states = images(4), []
    for mixed in (False, True):
        found = calibration(vit(), x, allocate=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            finished(found)
        first: Any = found.source.network.get_submodule("patch_embed.proj")
        states.append([first.input_quantizer.scale, first.weight_quantizer.scale])
    assert all(torch.equal(plain, mixed) for plain, mixed in zip(*states, strict=True))
