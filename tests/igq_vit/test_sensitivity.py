"""Estimates of perturbations: those of second order, for all layers from the same few passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.vits import NETWORKS, calibration, images, vit
from lightning_quant.igq_vit import sensitivity
from lightning_quant.igq_vit.calibration import Calibration
from lightning_quant.igq_vit.calibration_pass import Slot, emptied, filled_slots
from lightning_quant.igq_vit.perturbation import Replay, log_posteriors, perturbations
from lightning_quant.igq_vit.schemes import Candidates
from lightning_quant.igq_vit.sensitivity import estimated_perturbations

Tables = dict[Slot, dict[int, float]]


def fitted(kind: str, **settings: Any) -> Calibration:
    make, size, channels = NETWORKS[kind]
    found = calibration(make(), images(4, size, channels), **settings)
    found.step()
    return found


def chosen(found: Calibration) -> dict[Slot, Candidates]:
    return {slot: {g: q for g, q in found.candidates[slot].items() if g in (1, 4)} for slot in found.allocated}


def estimated(found: Calibration, x: Tensor | None = None) -> Tables:
    source = found.source
    with emptied(source.network, filled_slots(source.network)):
        images = source.inputs if x is None else x
        return estimated_perturbations(source.network, source.run, images, chosen(found), source.posteriors)


def measured(found: Calibration) -> Tables:
    source = found.source
    with emptied(source.network, filled_slots(source.network)):
        replay = Replay(source.network, source.forward, [name for name, _ in found.allocated])
        reference = log_posteriors(replay.outputs)
        return {
            slot: perturbations(replay, reference, slot, quantizers, log_posteriors)
            for slot, quantizers in chosen(found).items()
        }


@pytest.mark.parametrize("kind", NETWORKS)
def test_of_small_changes_they_are_the_divergences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A probe for each class: exact to second order.
    monkeypatch.setattr(sensitivity, "PROBES", 10)
    found = fitted(kind, activation_bits=10, group_ranges="envelope")
    estimates, expected = estimated(found), measured(found)
    for slot, values in expected.items():
        assert estimates[slot] == pytest.approx(values, rel=0.05, abs=1e-9), slot


@pytest.mark.parametrize("kind", NETWORKS)
def test_they_do_not_depend_on_how_images_are_divided(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fitted(kind)
    together = estimated(found)
    monkeypatch.setattr(sensitivity, "HELD_VALUES", 0)
    for slot, values in estimated(found).items():
        assert values == pytest.approx(together[slot], rel=1e-4), slot


def test_the_last_probe_stands_for_all_other_classes() -> None:
    log_p = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    probes = sensitivity._probes(log_p, images=3)
    assert probes.shape == (sensitivity.PROBES, 3, 40)
    assert torch.allclose(probes.square().sum(0), log_p.exp())
    counts = (probes != 0).sum(2)
    assert counts[:-1].eq(1).all()
    assert counts[-1].eq(40 - sensitivity.PROBES + 1).all()
    assert torch.equal(probes[0].abs().argmax(1), log_p.argmax(1))


def test_the_network_is_as_it_was() -> None:
    found = fitted("vit")
    before = {name: type(module) for name, module in found.source.network.named_modules()}
    estimated(found)
    assert {name: type(module) for name, module in found.source.network.named_modules()} == before
    assert all(parameter.grad is None for parameter in found.source.network.parameters())


def test_without_gradients_all_is_measured(recwarn: pytest.WarningsRecorder) -> None:
    found = calibration(vit(), images(4))

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            return found.source.network(x)

    object.__setattr__(found.source, "run", run)
    while not found.finished:
        found.step()
    assert any("log-probabilities have no gradient" in str(each.message) for each in recwarn)
    assert all(found.omega[slot].keys() == found.candidates[slot].keys() for slot in found.allocated)


def test_layers_with_the_same_input_are_told_apart() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = (nn.Linear(6, 3, bias=False) for _ in range(2))
            self.taps = nn.ModuleDict({"first": nn.Identity(), "second": nn.Identity()})

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.first(self.taps["first"](x)) - self.second(self.taps["second"](x))
            return logits

    network: Any = Twins()
    x = torch.randn(2, 6, requires_grad=True)
    network.taps = nn.ModuleDict({name: sensitivity.Tap() for name in network.taps})
    total = network(x).sum()
    gradients = torch.autograd.grad(total, [tap.recorded for tap in network.taps.values()])
    assert torch.allclose(gradients[0], network.first.weight.sum(0).expand(2, 6))
    assert torch.allclose(gradients[1], -network.second.weight.sum(0).expand(2, 6))
