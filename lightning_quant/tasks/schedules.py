"""Learning-rate schedules that span the run, and their Lightning configuration."""

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from lightning_quant.errors import ConfigurationError

RunSchedule = Literal["one_cycle", "cosine"]


def run_schedule(name: RunSchedule, optimizer: Optimizer, total_steps: float) -> LRScheduler:
    """Return a schedule to step after each of ``total_steps`` optimizer steps.

    The learning rates of the optimizer's groups are the maxima. ``one_cycle`` does not change the momentum.

    Args:
        name: ``one_cycle`` (up for 30 % of the steps, then down) or ``cosine`` (down to zero).
        optimizer: Optimizer whose learning rates the schedule sets.
        total_steps: Length of the run in optimizer steps.

    Raises:
        ConfigurationError: Unknown name, or a run without an end.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
        >>> schedule = run_schedule("cosine", optimizer, total_steps=2)
        >>> optimizer.step(); schedule.step()
        >>> round(optimizer.param_groups[0]["lr"], 6)
        0.1
    """
    if not math.isfinite(total_steps) or total_steps < 1:
        raise ConfigurationError(
            f"lr_scheduler='{name}' spans the run, found a run of {total_steps} steps. "
            "Write max_epochs or max_steps for the Trainer, or give a scheduler that needs no length."
        )
    steps = int(total_steps)
    match name:
        case "one_cycle":
            largest = [group["lr"] for group in optimizer.param_groups]
            return OneCycleLR(optimizer, largest, total_steps=steps, cycle_momentum=False)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
    raise ConfigurationError(f"Expected 'one_cycle', 'cosine' or a scheduler class, found lr_scheduler={name!r}.")


def configure_schedule(
    schedule: Callable[[Optimizer], Any] | RunSchedule,
    optimizer: Optimizer,
    total_steps: float,
    interval: Literal["epoch", "step"],
) -> LRSchedulerConfigType:
    """Return the ``lr_scheduler`` entry for ``configure_optimizers``.

    A ``ReduceLROnPlateau`` monitors ``val/loss`` unless it has a ``monitor`` of its own.

    Args:
        schedule: Name for :func:`run_schedule`, or callable from optimizer to scheduler.
        optimizer: Optimizer whose learning rates the schedule sets.
        total_steps: Length of the run in optimizer steps; only named schedules use it.
        interval: Interval at which a callable's scheduler steps; named schedules step after every batch.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
        >>> configure_schedule("one_cycle", optimizer, 10, "epoch")["interval"]
        'step'
    """
    if isinstance(schedule, str):
        return {"scheduler": run_schedule(schedule, optimizer, total_steps), "interval": "step"}
    scheduler = schedule(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        monitor = getattr(scheduler, "monitor", "val/loss")
        return {"scheduler": scheduler, "interval": interval, "monitor": monitor}
    return {"scheduler": scheduler, "interval": interval}


def with_schedule(
    optimizer: Optimizer,
    schedule: Callable[[Optimizer], Any] | RunSchedule | None,
    module: pl.LightningModule,
    interval: Literal["epoch", "step"],
) -> OptimizerLRScheduler:
    """Return what ``configure_optimizers`` returns for an optimizer and its schedule, which spans the run.

    Args:
        optimizer: Optimizer of the module.
        schedule: Schedule of :func:`configure_schedule`; None keeps the learning rates.
        module: Module, whose Trainer is asked for the length of the run where there is a schedule.
        interval: Interval at which a scheduler class steps.
    """
    if schedule is None:
        return optimizer
    steps = module.trainer.estimated_stepping_batches
    return {"optimizer": optimizer, "lr_scheduler": configure_schedule(schedule, optimizer, steps, interval)}
