"""Two and three gloo processes on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from helpers.networks import SmallNet, quantization, trainer
from helpers.processes import on_ranks
from lightning_quant import load_from_checkpoint
from lightning_quant.errors import QuantizationError
from lightning_quant.gradient import LargeGradientInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.gradient.optimizer import QuantizerOptimizer, own_counts, reduce_over_ranks
from lightning_quant.gradient.preparation import quantize_layers
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import Bits


def network(quantizer_lr: float = 1e-2) -> tuple[nn.Module, QuantizerOptimizer, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    layers = quantize_layers(module, {"0": Bits(4, 4, 4), "2": Bits(4, 4, 4)}, LargeGradientInterval(0.5, 0.01))
    for layer in layers.values():
        assert isinstance(layer.gradient_quantizer, GradientQuantizer)
        layer.gradient_quantizer.run.noise = NoiseSource(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return module, QuantizerOptimizer(layers, optimizer, quantizer_lr), optimizer


def batch(count: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def step_once(rank: int, ranks: int) -> dict[str, list[float]]:
    module, ours, _ = network()
    x = batch(60).chunk(ranks)[rank]
    (module(x) ** 3).mean().backward()
    assert (ours.ranges["0.input_quantizer"].grad is not None) == (x.numel() > 0)
    ours.step()
    ours.check_agreement()
    return {
        "gamma": [float(q.gamma) for q in ours.gradient_quantizers.values()],
        "range": [float(r) for r in ours.ranges.values()],
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_end_with_the_same_state(ranks: int) -> None:
    first, *others = on_ranks(ranks, step_once)
    assert all(other == first for other in others)


def start_ranges(rank: int, ranks: int, shift: float = 0.0) -> list[float]:
    module, ours, _ = network()
    module((batch(60) * (1 - 0.9 * bool(shift)) + shift).chunk(ranks)[rank])
    return [float(ours.ranges[f"{layer}.weight_quantizer"]) for layer in (0, 2)] + [
        float(ours.ranges["0.input_quantizer"])
    ]


# Values far from 0 start with their largest, those around it with their spread.
@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranges_start_from_the_union_of_the_ranks_batches(ranks: int, shift: float) -> None:
    expected = start_ranges(0, 1, shift)
    for found in on_ranks(ranks, lambda rank, ranks: start_ranges(rank, ranks, shift)):
        assert found == pytest.approx(expected, rel=1e-6)


def count_share(rank: int, ranks: int) -> list[float]:
    """Gammas after five steps on a static gradient; each rank sees its part, and the same largest value."""
    quantizer = GradientQuantizer(4, LargeGradientInterval(0.3, 0.01))
    quantizer.run.noise = NoiseSource(0)
    _, ours, _ = network()
    ours.gradient_quantizers, ours.ranges, ours.adam = {"x": quantizer}, {}, None
    rest = torch.linspace(0, 0.999, 600)[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    gammas = []
    for i in range(5):
        quantizer.quantize(torch.cat([rest.chunk(ranks)[rank], torch.ones(1)]))
        if i == 0:
            quantizer.gamma.fill_(0.9)
        ours.step()
        gammas.append(float(quantizer.gamma))
    return gammas


@pytest.mark.parametrize("ranks", [2, 3])
def test_gamma_of_several_ranks_is_that_of_one_on_the_union(ranks: int) -> None:
    expected = count_share(0, 1)
    assert expected[0] != expected[4]
    for found in on_ranks(ranks, count_share):
        assert found == pytest.approx(expected, rel=1e-6)


class NearestRounding(NoiseSource):
    """No noise, so that what is rounded does not depend on how a batch is divided."""

    def draw(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(count, device=device)


def trained(rank: int, ranks: int, rows: torch.Tensor, gradient_bits: int) -> dict[str, list[float]]:
    """All that ten steps leave, on this rank's share of some rows."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    layers = quantize_layers(module, dict.fromkeys("02", Bits(4, 4, gradient_bits)), LargeGradientInterval(0.5, 0.01))
    for layer in layers.values():
        if isinstance(layer.gradient_quantizer, GradientQuantizer):
            layer.gradient_quantizer.run.noise = NearestRounding(0)
    wrapped = nn.parallel.DistributedDataParallel(module) if ranks > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    ours = QuantizerOptimizer(layers, optimizer, 1e-2)
    for _ in range(10):
        own = rows.tensor_split(ranks)[rank]
        # A mean over all rows, whatever the share.
        (wrapped(own) ** 2).mean(1).sum().mul(ranks / len(rows)).backward()
        optimizer.step()
        ours.step()
        optimizer.zero_grad()
    ours.check_agreement()
    state = {name: value for name, value in module.state_dict().items() if "_extra_state" not in name}
    return {name: value.double().flatten().tolist() for name, value in state.items()}


# A division by a power of two is exact: the gradient that the interval starts from lies on its very end.
@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_of_ranks_are_those_of_one_on_the_union(ranks: int) -> None:
    # Largest gradients are each rank's own: with the same rows they are those of the union.
    rows = batch(7).repeat(ranks, 1)
    expected = trained(0, 1, rows, gradient_bits=4)
    for found in on_ranks(ranks, lambda rank, ranks: trained(rank, ranks, rows, gradient_bits=4)):
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_weights_of_uneven_shares_are_those_of_one_on_the_union(ranks: int) -> None:
    rows = batch(20)
    expected = trained(0, 1, rows, gradient_bits=32)
    for found in on_ranks(ranks, lambda rank, ranks: trained(rank, ranks, rows, gradient_bits=32)):
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


def test_ranges_on_a_device_need_no_quantizer_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for any but the CPU."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    parameter = torch.zeros((), device="meta", requires_grad=True)
    parameter.grad = torch.zeros((), device="meta")
    counts, distance = reduce_over_ranks([], [parameter], own_counts([]))
    assert counts.total.device.type == distance.device.type == "meta"


def disagree(rank: int, ranks: int) -> str:
    module, ours, _ = network()
    for _ in range(2):
        (module(batch(20)) ** 3).mean().backward()
        ours.step()
    ours.check_agreement()
    if rank == 1:
        list(ours.gradient_quantizers.values())[1].gamma.mul_(0.5)
    (module(batch(20)) ** 3).mean().backward()
    ours.step()
    with pytest.raises(QuantizationError) as error:
        ours.check_agreement()
    return str(error.value)


def test_a_rank_with_another_state_stops_the_run_with_the_layers_name() -> None:
    for rank, message in enumerate(on_ranks(2, disagree)):
        assert f"Rank {rank}: the state of 2.gradient_quantizer is" in message


def collectives(rank: int, ranks: int) -> int:
    module, ours, _ = network()
    (module(batch(20)) ** 3).mean().backward()
    ours.step()
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]  # type: ignore[func-returns-value]
    (module(batch(20)) ** 3).mean().backward()
    ours.step()
    return len(calls)


def test_a_step_costs_one_collective() -> None:
    assert on_ranks(2, collectives) == [1, 1]


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """OpenMP's threads do not survive a fork: a child that asks for more than one waits for them forever."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_lightnings_ddp_trains_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    keep = ModelCheckpoint(tmp_path, filename="last")
    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 2, "enable_checkpointing": True}
    trainer(quantization(), keep, default_root_dir=tmp_path, **options).fit(SmallNet())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["GradientQuantization"]
    # 32 images, 8 a batch, two ranks, two epochs.
    assert (state["batches"], state["optimizers"][0]["steps"]) == (4, 4)
    loaded = load_from_checkpoint(SmallNet, tmp_path / "last.ckpt")
    assert loaded.net[3].weight_quantizer.ready  # type: ignore[union-attr]
