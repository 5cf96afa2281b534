import math
from typing import Any, Literal

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_quant.errors import ConfigurationError
from lightning_quant.tasks.schedules import RunSchedule, configure_schedule, run_schedule


def _optimizer() -> SGD:
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.1}]
    return SGD(groups, lr=0.4, momentum=0.9)


def _rates(optimizer: Optimizer, name: RunSchedule, steps: int) -> list[tuple[float, ...]]:
    schedule = run_schedule(name, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step() if len(rates) < steps else None
    return rates


def test_one_cycle_rises_to_the_optimizers_rates_and_falls_to_almost_zero() -> None:
    optimizer = _optimizer()
    rates = [first for first, _ in _rates(optimizer, "one_cycle", 100)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.4, rel=1e-3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-4 * rates[peak]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_cosine_falls_from_the_optimizers_rates_as_a_half_cosine() -> None:
    rates = _rates(_optimizer(), "cosine", 20)
    for step, (first, second) in enumerate(rates):
        share = (1 + math.cos(math.pi * step / 20)) / 2
        assert (first, second) == pytest.approx((0.4 * share, 0.1 * share))


def test_one_cycle_needs_no_momentum() -> None:
    assert len(_rates(Adam([torch.zeros(1)]), "one_cycle", 5)) == 5


def test_a_name_steps_every_batch_and_a_callable_when_asked() -> None:
    assert configure_schedule("cosine", _optimizer(), 5, "epoch")["interval"] == "step"

    def halve(optimizer: Optimizer) -> StepLR:
        return StepLR(optimizer, 1, 0.5)

    intervals: tuple[Literal["epoch", "step"], ...] = ("epoch", "step")
    for interval in intervals:
        assert configure_schedule(halve, _optimizer(), math.inf, interval)["interval"] == interval


def test_a_plateau_watches_the_validation_loss() -> None:
    assert configure_schedule(ReduceLROnPlateau, _optimizer(), 5, "epoch")["monitor"] == "val/loss"


@pytest.mark.parametrize("steps", [math.inf, 0])
def test_a_run_without_an_end_is_refused(steps: float) -> None:
    with pytest.raises(ConfigurationError, match=f"a run of {steps} steps.*max_epochs"):
        run_schedule("one_cycle", _optimizer(), steps)


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="found lr_scheduler='linear'"):
        run_schedule("linear", _optimizer(), 5)  # type: ignore[arg-type]
