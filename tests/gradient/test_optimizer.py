import pytest
import torch
from torch import nn

from lightning_quant.errors import CheckpointError
from lightning_quant.gradient import FixedInterval, IntervalStrategy, LargeGradientInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.gradient.optimizer import QuantizerOptimizer
from lightning_quant.gradient.preparation import quantize_layers
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import Bits


def setting(
    interval: IntervalStrategy | None = None, lr: float = 0.1
) -> tuple[nn.Module, torch.optim.Optimizer, QuantizerOptimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    chosen = {"0": Bits(4, 4, 4), "2": Bits(8, 8, 8)}
    layers = quantize_layers(network, chosen, interval or LargeGradientInterval(0.5, 0.01))
    noise = NoiseSource(0)
    for layer in layers.values():
        assert isinstance(layer.gradient_quantizer, GradientQuantizer)
        layer.gradient_quantizer.run.noise = noise
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    return network, optimizer, QuantizerOptimizer(layers, optimizer, lr=1e-2)


def backward(network: nn.Module, scale: float = 1.0) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    (network(x) ** 3).mean().mul(scale).backward()


def test_each_layer_moves_against_its_own_target() -> None:
    network, _, ours = setting()
    backward(network)
    first, last = ours.gradient_quantizers.values()
    first.gamma.fill_(0.5)
    last.gamma.fill_(0.5)
    first.run.clipped, first.run.total = torch.tensor(9.0), torch.tensor(300.0)
    last.run.clipped, last.run.total = torch.tensor(1.0), torch.tensor(300.0)
    ours.step()
    # 9/300 is below the 0.5/15 of 4 bits, 1/300 above the 0.5/255 of 8 bits.
    assert [float(first.gamma), float(last.gamma)] == pytest.approx([0.49, 0.51])


def test_a_layer_without_gradients_keeps_its_interval() -> None:
    network, _, ours = setting()
    backward(network)
    first, last = ours.gradient_quantizers.values()
    before = float(last.gamma)
    last.run.clipped = last.run.total = None
    ours.step()
    assert float(last.gamma) == before
    assert first.run.clipped is None


def test_ranges_take_the_step_of_adam_and_drop_their_gradients() -> None:
    network, _, ours = setting()
    backward(network)
    twins = [r.detach().clone().requires_grad_() for r in ours.ranges.values()]
    for twin, parameter in zip(twins, ours.ranges.values(), strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad.clone()
    torch.optim.Adam(twins, lr=1e-2).step()
    ours.step()
    for twin, parameter in zip(twins, ours.ranges.values(), strict=True):
        torch.testing.assert_close(parameter, twin)
        assert parameter.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_momentum_moves_no_range_whose_gradient_says_nothing(value: float) -> None:
    network, _, ours = setting()
    backward(network)
    ours.step()
    network.zero_grad()
    backward(network)
    silent, *others = ours.ranges.values()
    assert silent.grad is not None
    silent.grad.fill_(value)
    before = [float(r.detach()) for r in ours.ranges.values()]
    ours.step()
    after = [float(r.detach()) for r in ours.ranges.values()]
    assert after[0] == before[0]
    assert len(others) == 3
    assert all(a != b for a, b in zip(after[1:], before[1:], strict=True))


def test_a_gradient_scaler_makes_no_difference() -> None:
    states = []
    for scale in (1.0, 1024.0):
        network, _, ours = setting(FixedInterval(1.0))
        for _ in range(2):
            backward(network, scale)
            ours.step(scale)
            network.zero_grad()
        states.append(torch.stack([r.detach() for r in ours.ranges.values()]))
    torch.testing.assert_close(states[0], states[1])


def test_a_range_gradient_that_is_not_finite_does_not_move_its_range() -> None:
    network, _, ours = setting()
    backward(network)
    name, parameter = next(iter(ours.ranges.items()))
    before = parameter.detach().clone()
    parameter.grad = torch.tensor(float("nan"))
    ours.step()
    assert torch.equal(parameter, before), name


@pytest.mark.parametrize("kind", ["one_cycle", "step", "none"])
def test_the_base_learning_rate_is_the_peak_of_the_schedule(kind: str) -> None:
    network, optimizer, _ = setting()
    if kind == "one_cycle":
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    elif kind == "step":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.01
    layers = {"0": network.get_submodule("0")}
    ours = QuantizerOptimizer(layers, optimizer, lr=1e-2)  # type: ignore[arg-type]
    assert ours.base_lrs[0] == {"one_cycle": 0.5, "step": 0.1, "none": 0.1}[kind]


def test_the_state_continues_and_that_of_other_layers_is_refused() -> None:
    network, _, ours = setting()
    for _ in range(3):
        backward(network)
        ours.step()
    _, _, twin = setting()
    twin.load_state_dict(ours.state_dict())
    assert twin.steps == 3
    other = QuantizerOptimizer({}, torch.optim.SGD(network.parameters(), lr=0.1), lr=1e-2)
    with pytest.raises(CheckpointError, match="holds the ranges of 4 tensors, this run learns 0"):
        other.load_state_dict(ours.state_dict())
