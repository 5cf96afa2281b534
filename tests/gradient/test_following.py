"""Layers that start at zero or very small learn in few bits too; others are left as they are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.networks import Images, fitted, quantization, trainer
from helpers.processes import on_ranks
from lightning_quant.gradient import GradientQuantization, LargeGradientInterval
from lightning_quant.gradient.following import CLIPPED, factors, own_sums, usual_size
from lightning_quant.gradient.optimizer import QuantizerOptimizer
from lightning_quant.gradient.preparation import quantize_layers
from lightning_quant.nn import Bits
from lightning_quant.quantizers import LearnedQuantizer

STARTS = {"zero": nn.init.zeros_, "tiny": lambda w: nn.init.normal_(w, std=1e-5)}


class Zero(pl.LightningModule):
    """All goes through a layer that starts at zero, and on through one whose input so starts at zero."""

    def __init__(self, start: str = "zero", kind: str = "adam") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        small = nn.Conv2d(8, 8, 3, padding=1)
        STARTS[start](small.weight)
        nn.init.zeros_(small.bias)  # type: ignore[arg-type]
        first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        last = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
        self.net = nn.Sequential(first, small, last)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "adam":
            return torch.optim.Adam(self.parameters(), 2e-3)
        return torch.optim.SGD(self.parameters(), 0.015, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(96), batch_size=16)

    def last(self) -> float:
        return sum(self.losses[-6:]) / 6


def trained(callback: GradientQuantization | None, epochs: int = 13, **kwargs: Any) -> Zero:
    module = Zero(**kwargs)
    trainer(*([callback] if callback else []), max_epochs=epochs).fit(module)
    return module


@pytest.mark.parametrize("bits", [(4, 4, 4), (4, 32, 32), (32, 4, 4), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_a_layer_that_starts_at_zero_learns(bits: tuple[int, int, int], kind: str) -> None:
    # ln 3 = 1.10 where nothing is learned.
    assert trained(GradientQuantization(*bits), kind=kind).last() < 0.35


def test_a_layer_that_starts_tiny_learns() -> None:
    assert trained(GradientQuantization(), start="tiny").last() < 0.35


def test_what_kept_up_is_said_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    callback = GradientQuantization()
    with caplog.at_level("INFO"):
        trained(callback, epochs=3)
    assert caplog.text.count("Ranges lagged behind") == 1
    followed = callback._optimizers[0].followed()
    assert followed.keys() == {"net.1.weight_quantizer", "net.2.0.input_quantizer"}
    assert all(name in caplog.text for name in followed)
    state = callback.state_dict()["optimizers"][0]
    assert state["followed"] == [followed.get(name, 0) for name in state["names"]]


def test_layers_that_start_as_usual_are_left_alone() -> None:
    callback = quantization()
    fitted(callback, max_epochs=6, decay=0.9)
    # Pooled features grow while a network learns.
    assert callback._optimizers[0].followed().keys() <= {"net.8.input_quantizer"}


def test_micro_batches_move_a_range_once_an_optimizer_step() -> None:
    module, callback = Zero(), GradientQuantization()
    ranges: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ranges.append(float(module.net[1].weight_quantizer.range))  # type: ignore[union-attr, arg-type]

    trainer(callback, Watch(), max_epochs=4, accumulate_grad_batches=3).fit(module)
    started = [r for r in ranges if r == r]
    moved = [i for i, (a, b) in enumerate(pairwise(ranges), 1) if b > 1.5 * a]
    assert moved
    assert all(i % 3 == 2 for i in moved)
    assert max(b / a for a, b in pairwise(started)) < 2.1


def test_a_training_that_was_stopped_in_between_goes_on_exactly(tmp_path: Path) -> None:
    straight, resumed = Zero(), Zero()
    ours = GradientQuantization()
    trainer(ours, max_epochs=4).fit(straight)
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer(GradientQuantization(), keep, enable_checkpointing=True, max_epochs=1).fit(Zero())
    again = GradientQuantization()
    trainer(again, max_epochs=4).fit(resumed, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.state_dict()["optimizers"][0]["followed"] == ours.state_dict()["optimizers"][0]["followed"]
    assert sum(ours.state_dict()["optimizers"][0]["followed"]) > 0
    expected = straight.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_evaluation_and_frozen_layers_move_nothing() -> None:
    module = trained(GradientQuantization(), epochs=1)
    layer: Any = module.net[1]
    layer.weight.data.mul_(1000)
    before = layer.weight_quantizer.range.clone()
    layer.weight.requires_grad_(False)
    trainer(GradientQuantization(), max_epochs=1).fit(module)
    assert torch.equal(layer.weight_quantizer.range, before)


# -- the rule ----------------------------------------------------------------------------------------------------


def quantizer_of(values: Tensor, bound: float, bits: int = 4, signed: bool = True) -> LearnedQuantizer:
    quantizer = LearnedQuantizer(bits, signed)
    quantizer.initialize(torch.ones(1))
    quantizer.range.data.fill_(bound)
    quantizer.sample = values
    return quantizer


def factor(values: Tensor, bound: float, bits: int = 4, usual: float = 1.0, signed: bool = True) -> float:
    quantizer = quantizer_of(values, bound, bits, signed)
    return float(factors(own_sums([quantizer]), quantizer.range.detach()[None], torch.tensor([usual])))


def normal(count: int = 1000) -> Tensor:
    values: Tensor = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_range_near_what_it_starts_with_or_learns_stays(bits: int, scale: float) -> None:
    # From the ternary range of the least error to twice the start.
    for bound in (1.22, 3.0, 5.0):
        assert factor(normal() * scale, bound * scale, bits, usual=2 * scale) == 1.0
    assert factor(normal() * scale, 0.5 * scale, bits, usual=2 * scale) == 2.0


@pytest.mark.parametrize("rectified", [False, True])
def test_a_range_that_is_far_too_small_reaches_its_tensor_and_stops(rectified: bool) -> None:
    values = normal().clamp_min(0) if rectified else normal()
    bound, steps = 1e-3, 0
    while factor(values, bound, signed=not rectified) == 2:
        bound, steps = 2 * bound, steps + 1
    assert 9 <= steps <= 12
    assert (values.abs() > bound).double().mean() <= CLIPPED * (values != 0).double().mean()


def test_weights_that_stopped_at_their_range_are_seen() -> None:
    assert factor(torch.full((100,), 1.0001), 1.0) == 2.0
    assert factor(torch.cat([torch.full((40,), 1.0001), torch.linspace(-1, 1, 60)]), 1.0) == 2.0


def test_few_values_far_from_many_zeros_are_clipped_as_at_the_start() -> None:
    values = torch.zeros(1000)
    values[:10] = 1.0
    assert factor(values, 3 * float(values.std())) == 1.0


def test_beyond_the_usual_size_a_range_is_left_to_adam() -> None:
    assert factor(normal() * 10, 1.4) == 2.0
    assert factor(normal() * 10, 1.6) == 1.0


def test_a_range_under_which_all_codes_are_zero_shrinks_until_one_is_not() -> None:
    values, bound = normal(), 1e4
    while factor(values, bound) == 0.5:
        bound /= 2
    assert 2 * 7 * float(values.max()) / 2 < bound <= 2 * 7 * float(values.max())
    assert factor(torch.zeros(10), 1.0) == 1.0


@pytest.mark.parametrize("values", [torch.full((9,), float("nan")), torch.full((9,), float("inf")), torch.zeros(0)])
def test_what_says_nothing_moves_nothing(values: Tensor) -> None:
    assert factor(values, 1.0) == 1.0


@pytest.mark.parametrize(
    "layer", [nn.Linear(48, 32), nn.Conv2d(16, 32, 3), nn.Conv2d(16, 16, 3, groups=16), nn.ConvTranspose2d(8, 16, 3)]
)
def test_the_usual_size_is_that_of_pytorchs_initialization(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()  # type: ignore[operator]
    found = float(layer.weight.detach().square().mean().sqrt())  # type: ignore[union-attr, operator]
    assert usual_size(layer, "weight_quantizer") == pytest.approx(found, rel=0.1)


def grown(rank: int, ranks: int) -> list[float]:
    """Ranges after inputs and a weight grew a hundredfold within ten steps; each rank sees its share."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    nn.init.normal_(module[0].weight, std=1e-3)  # type: ignore[arg-type]
    layers = quantize_layers(module, dict.fromkeys("01", Bits(4, 4, 32)), LargeGradientInterval())
    ours = QuantizerOptimizer(layers, torch.optim.SGD(module.parameters(), 0.1), 1e-5)
    rows = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(10):
        module(rows.tensor_split(ranks)[rank]).square().mean().backward()
        module.zero_grad()
        ours.step()
        module[0].weight.data.mul_(1.6)  # type: ignore[operator]
    ours.check_agreement()
    return [*(float(r) for r in ours.ranges.values()), float(sum(ours.followed().values()))]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_follow_as_one_on_the_union(ranks: int) -> None:
    expected = grown(0, 1)
    assert expected[-1] >= 5
    for found in on_ranks(ranks, grown):
        assert found == pytest.approx(expected, rel=1e-3)
