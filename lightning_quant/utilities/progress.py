"""What a user sees of a calibration while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.markup import escape
from rich.progress import Progress


class ProgressBar:
    """A progress bar with the time left, on the first rank, where the Trainer shows bars, and of their kind.

    Args:
        trainer: whose progress bar is switched on or off, and is drawn by rich or by tqdm.
        total: of what is counted.
        description: in front of the bar.
    """

    def __init__(self, trainer: pl.Trainer, total: int, description: str) -> None:
        theirs = getattr(trainer, "progress_bar_callback", None)
        shown = trainer.is_global_zero and theirs is not None
        self.bar: Any
        if shown and isinstance(theirs, RichProgressBar):
            self.bar = _RichBar(theirs, trainer, total, description)
        else:
            self.bar = Tqdm(total=total, desc=description, disable=not shown, leave=False)

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


class _RichBar:
    """A line among those of Lightning's rich bar while it is drawn, or by itself: rich draws one display at a time."""

    def __init__(self, theirs: RichProgressBar, trainer: pl.Trainer, total: int, description: str) -> None:
        drawn: Progress | None = theirs.progress
        self._theirs = theirs if drawn is not None and drawn.live.is_started else None
        if drawn is None or self._theirs is None:
            drawn = Progress(*theirs.configure_columns(trainer), transient=True, disable=theirs.is_disabled)
            drawn.start()
        self._progress = drawn
        self._description = description
        self._task = self._progress.add_task(description, total=total)

    def set_postfix_str(self, s: str, refresh: bool) -> None:
        self._progress.update(self._task, description=f"{self._description} {escape(s)}")

    def update(self, n: int) -> None:
        self._progress.update(self._task, advance=n)
        if self._theirs is not None:
            self._theirs.refresh()

    def close(self) -> None:
        if self._theirs is None:
            self._progress.stop()
        else:
            # Not removed: Lightning finds its own by their places.
            self._progress.update(self._task, visible=False)
            self._progress.refresh()
