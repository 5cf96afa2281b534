"""Terminal output of the demo: one named progress bar per training, without Lightning's messages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_CHATTER = ("lightning.pytorch", "lightning.fabric")
Item = TypeVar("Item")


class RunBar(TQDMProgressBar):
    """Progress bar with a title, one for a whole training; none for the test."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.set_description(f"{self.title:<32}")
        bar.total = int(self.trainer.max_epochs or 0) * int(self.total_train_batches)
        return bar

    def init_test_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keep the bar across epochs."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.current_epoch * int(self.total_train_batches) + batch_idx + 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done - 1)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown


def counted(items: Sequence[Item], title: str) -> Iterator[Item]:
    """Yield the items with a progress bar that looks like that of a training."""
    yield from Tqdm(items, desc=f"{title:<32}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's messages about devices and its advice, which do not apply to these small runs."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in ("The '.*_dataloader' does not have many workers", ".*LeafSpec", ".*GPU available"):
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: such small networks gain little from a second one, and are slowed down on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
