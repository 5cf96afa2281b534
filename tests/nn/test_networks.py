"""Which parts of a LightningModule train, help, or copy another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn import Bits, Plan, plan_layers

FOUR = Bits(4, 4, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))


def module(*, by_hand: bool = False, **parts: Any) -> pl.LightningModule:
    made = pl.LightningModule()
    made.automatic_optimization = not by_hand
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def plan(made: nn.Module, **arguments: Any) -> Plan:
    return plan_layers(made, FOUR, training=True, **arguments)


def notes(found: Plan) -> dict[str, str]:
    return {row.name: row.note for row in found.layers if row.note}


def frozen(part: nn.Module) -> nn.Module:
    return part.requires_grad_(False)


HELPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "perceptual network": lambda _: frozen(net().eval()),
    "teacher": lambda _: frozen(net()),
    "float copy of the student": lambda student: frozen(copy.deepcopy(student)),
    "by its name": lambda _: nn.ModuleDict({"a": frozen(net()), "b": frozen(net())}),
    "a single filter": lambda _: frozen(nn.Conv2d(3, 3, 3)),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("helper", HELPERS.values(), ids=list(HELPERS))
def test_a_frozen_part_stays_in_float_and_moves_no_first_and_last(
    helper: Callable[..., nn.Module], first: bool
) -> None:
    trained = net()
    parts: dict[str, Any] = {"trained": trained, "helper": helper(trained)}
    found = plan(module(**dict(reversed(parts.items())) if first else parts))
    assert list(found.chosen) == ["trained.2"]
    assert {row.note for row in found.layers if row.name.startswith("trained")} == {"first layer", "", "last layer"}
    left = {row.note for row in found.layers if row.name.startswith("helper")}
    assert left <= {f"frozen: helper{part} has no trainable parameter" for part in ("", ".a", ".b")}
    assert left


def test_frozen_layers_within_a_network_that_trains_are_on_its_path() -> None:
    trained = net()
    frozen(trained[:3])
    assert list(plan(module(net=trained)).chosen) == ["net.2"]
    trained.insert(4, frozen(nn.Conv2d(8, 8, 3)))
    assert list(plan(module(net=trained)).chosen) == ["net.2", "net.4"]


def test_include_names_frozen_parts_too_and_exclude_still_leaves_them() -> None:
    made = module(net=net(), helper=frozen(net()))
    assert list(plan(made, include="*").chosen) == ["net.2", "net.4", "helper.0", "helper.2"]
    assert list(plan(made, include="*", exclude="helper").chosen) == ["net.2"]


def test_where_nothing_trains_all_is_planned() -> None:
    assert list(plan(frozen(module(net=net()))).chosen) == ["net.2"]


def test_a_head_that_alone_trains_says_how_to_take_the_rest() -> None:
    with pytest.raises(UnsupportedModelError, match=r'All 1 layers.*include="\*" to add the 3 frozen layers'):
        plan(module(backbone=frozen(net()), head=nn.Linear(3, 2)))


def test_networks_that_are_optimized_one_by_one_have_each_their_first_and_last_layer() -> None:
    found = plan(module(by_hand=True, generator=net(), discriminator=net(), judge=frozen(net())))
    assert list(found.chosen) == ["generator.2", "discriminator.2"]
    assert {name: note for name, note in notes(found).items() if not name.startswith("judge")} == {
        "generator.0": "first layer of generator",
        "generator.4": "last layer of generator",
        "discriminator.0": "first layer of discriminator",
        "discriminator.4": "last layer of discriminator",
    }


def test_what_one_optimizer_trains_is_one_network() -> None:
    found = plan(module(encoder=net(), decoder=net()))
    assert notes(found) == {"encoder.0": "first layer", "decoder.4": "last layer"}
    flat = module(stem=nn.Conv2d(3, 8, 3), middle=nn.Conv2d(8, 8, 3), again=nn.Conv2d(8, 8, 3), head=nn.Linear(8, 2))
    assert list(plan(flat).chosen) == ["middle", "again"]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_copy_is_planned_as_its_original(wrapped: bool) -> None:
    trained = net()
    average = torch.optim.swa_utils.AveragedModel(trained) if wrapped else copy.deepcopy(trained)
    name = "average.module" if wrapped else "average"
    found = plan(module(net=trained, average=average), first_and_last="same", exclude=["net.2", "net.4"])
    assert list(found.chosen) == ["net.0", f"{name}.0"]
    assert notes(found)[f"{name}.4"] == "copy of net.4"


def test_a_copy_that_is_excluded_stays_in_float() -> None:
    trained = net()
    found = plan(module(net=trained, average=copy.deepcopy(trained)), exclude="average")
    assert list(found.chosen) == ["net.2"]


def test_networks_of_one_kind_that_start_apart_are_no_copies() -> None:
    assert not any(row.original for row in plan(module(one=net(), other=net())).layers)


def test_a_module_that_is_not_lightnings_is_one_network() -> None:
    both = nn.ModuleDict({"net": net(), "helper": frozen(net())})
    assert list(plan(both).chosen) == ["net.2", "net.4", "helper.0", "helper.2"]
