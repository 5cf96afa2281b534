"""A calibration step by step: what each step does, and that a stopped one goes on to the same end."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.vits import calibration, evaluate, finished, images, vit
from lightning_quant import strip
from lightning_quant.calibration.record import STEPS
from lightning_quant.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from lightning_quant.igq_vit.allocation import allocate, budget_at
from lightning_quant.igq_vit.calibration import INPUT, SOFTMAX
from lightning_quant.igq_vit.calibration_pass import emptied, filled_slots
from lightning_quant.igq_vit.perturbation import Replay, log_posteriors, perturbations
from lightning_quant.igq_vit.shortlist import combined


def test_allocation_keeps_the_budget_and_is_not_worse_than_the_same_everywhere() -> None:
    found = finished(calibration(vit(), images(8)))
    slots, costs = found.costs(INPUT)
    used = sum(cost[found.groups[slot]] for slot, cost in zip(slots, costs, strict=True))
    assert used <= sum(cost[4] for cost in costs)
    known = {slot: combined(found.estimates[slot], found.omega[slot]) for slot in slots}
    chosen = sum(known[slot][found.groups[slot]] for slot in slots)
    assert chosen <= sum(known[slot][4] for slot in slots) * (1 + 1e-9)
    rows = [slot for slot in found.groups if slot[1] == SOFTMAX]
    assert sum(found.groups[slot] for slot in rows) <= 4 * len(rows)
    for (name, slot), groups in found.groups.items():
        assert getattr(found.source.network.get_submodule(name), slot).groups == groups


def trained_vit() -> tuple[nn.Module, torch.Tensor]:
    """A small transformer that knows most digits, and images to calibrate it on."""
    data = load_digits()
    x, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    network = vit().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(150):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[batch]), labels[batch]).backward()
        optimizer.step()
    assert (network.eval()(x[:200]).argmax(1) == labels[:200]).float().mean() > 0.8
    return network, x[:16]


def test_allocation_is_as_good_as_that_of_the_full_table_in_at_most_60_passes() -> None:
    network, x = trained_vit()
    found = calibration(network, x)
    found.step()
    with FlopCounterMode(display=False) as one:
        evaluate(network, x)
    with FlopCounterMode(display=False) as all_steps:
        finished(found)
    assert all_steps.get_total_flops() <= 60 * one.get_total_flops()
    with emptied(network, filled_slots(network)):
        replay = Replay(network, found.source.forward, [name for name, _ in found.allocated])
        reference = log_posteriors(replay.outputs)
        full = {
            slot: perturbations(replay, reference, slot, found.candidates[slot], log_posteriors)
            for slot in found.allocated
        }
    for slot, measured in found.omega.items():
        assert measured == {groups: full[slot][groups] for groups in measured}
    for kind in (INPUT, SOFTMAX):
        slots, costs = found.costs(kind)
        best = allocate([full[slot] for slot in slots], costs, budget_at(costs, 4))
        least = sum(full[slot][groups] for slot, groups in zip(slots, best, strict=True))
        assert sum(full[slot][found.groups[slot]] for slot in slots) <= 1.01 * least


def test_a_budget_in_bit_operations_is_kept() -> None:
    plan = calibration(vit(), images(8)).source.plan
    budget = plan.bops(2).total / 1e9
    found = finished(calibration(vit(), images(8), budget=budget))
    chosen = {name: groups for (name, slot), groups in found.groups.items() if slot == INPUT}
    assert plan.bops(chosen).total <= budget * 1e9
    with pytest.raises(ConfigurationError, match=r"one group in every layer already needs .*\. Write budget="):
        calibration(vit(), images(8), budget=1e-6)


@pytest.mark.parametrize("stop", [1, 2, 3, 9, 12])
def test_stopped_after_any_step_it_goes_on_to_the_same_network(stop: int) -> None:
    """A file gives the names of a state back sorted as text; the order of a state means nothing."""
    x, fresh = images(4), images(5, seed=9)
    straight = finished(calibration(vit(), x))
    assert straight.total == 13
    first = calibration(vit(), x)
    for _ in range(stop):
        first.step()
    state = {key: value.clone() for key, value in sorted(first.state_dict().items())}
    second = calibration(vit(), x)
    second.load_state_dict(state)
    assert second.done == stop
    assert list(second.record()) == list(first.record())
    assert {slot: list(each) for slot, each in second.candidates.items()} == {
        slot: list(each) for slot, each in first.candidates.items()
    }
    finished(second)
    assert second.groups == straight.groups
    assert second.omega == straight.omega
    assert torch.equal(evaluate(second.source.network, fresh), evaluate(straight.source.network, fresh))


def test_a_state_of_other_settings_is_refused() -> None:
    first = calibration(vit(), images(4))
    first.step()
    with pytest.raises(CheckpointError, match="calibrate again"):
        calibration(vit(), images(4), weight_bits=6).load_state_dict(first.state_dict())


def test_a_state_of_other_images_is_refused() -> None:
    first, second = (calibration(vit(), images(4)) for _ in range(2))
    first.source = replace(first.source, images="1")
    second.source = replace(second.source, images="2")
    first.step()
    with pytest.raises(CheckpointError, match="or other images: calibrate again"):
        second.load_state_dict(first.state_dict())


def test_a_state_says_how_far_it_is() -> None:
    found = calibration(vit(), images(4))
    said = [found.state_dict()[STEPS].tolist()]
    while not found.finished:
        found.step()
        said.append(found.state_dict()[STEPS].tolist())
    assert said == [[done, 13] for done in range(14)]


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
        ({"allocate": False, "budget": 3.0}, "budget=3.0 is distributed over layers: write allocate=True"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        calibration(vit(), images(2), **settings)


def test_a_network_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no attention"):
        calibration(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images(2))


@pytest.mark.parametrize("exclude", ["*.attn", "blocks.0"])
def test_a_calibration_without_all_or_some_attentions_has_the_float_network_there(exclude: str) -> None:
    network, x = vit(), images(4)
    finished(calibration(network, x, exclude=(exclude,)))
    left = [name for name, _ in network.named_modules() if fnmatchcase(name, exclude)]
    for name in left:
        mine, plain = network.get_submodule(name), vit().get_submodule(name)
        y = torch.randn(2, 17, 32)
        assert torch.equal(evaluate(mine, y), evaluate(plain, y))
    assert not torch.equal(evaluate(network, x), evaluate(vit(), x))


def test_excluded_modules_stay_in_float() -> None:
    network = vit()
    found = finished(calibration(network, images(4), allocate=False, exclude=("blocks.0.attn", "*.fc2")))
    names = found.source.plan.names("grouped", "attention")
    assert names == ["blocks.0.mlp.fc1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert type(network.get_submodule("blocks.0.attn.qkv")) is nn.Linear
