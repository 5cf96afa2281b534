"""What a user sees of a calibration while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class ProgressBar:
    """A progress bar with the time left, on the first rank, where the Trainer shows bars.

    Args:
        trainer: whose progress bar is switched on or off.
        total: of what is counted.
        description: in front of the bar.
    """

    def __init__(self, trainer: pl.Trainer, total: int, description: str) -> None:
        shown = trainer.is_global_zero and getattr(trainer, "progress_bar_callback", None) is not None
        self.bar: Any = Tqdm(total=total, desc=description, disable=not shown, leave=False)

    def update(self, count: int = 1, what: str = "") -> None:
        """Count, and show what was done."""
        if what:
            self.bar.set_postfix_str(what, refresh=False)
        self.bar.update(count)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(85), duration(700), duration(12_000)
    ('85 s', '12 min', '3.3 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
