"""Progress bar of a calibration."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.markup import escape
from rich.progress import Progress


class ProgressBar:
    """Progress bar with the remaining time, in the style of the Trainer's bar. It is shown only if that one is.

    Args:
        trainer: Trainer whose progress bar decides the style (rich or tqdm) and whether this one is shown.
        total: Final count.
        description: Text in front of the bar.
    """

    def __init__(self, trainer: pl.Trainer, total: int, description: str) -> None:
        callback = getattr(trainer, "progress_bar_callback", None)
        shown = trainer.is_global_zero and callback is not None
        self.bar: Any
        if shown and isinstance(callback, RichProgressBar):
            self.bar = _RichBar(callback, trainer, total, description)
        else:
            self.bar = Tqdm(total=total, desc=description, disable=not shown, leave=False)

    def update(self, count: int = 1, what: str = "") -> None:
        """Advance the bar by ``count`` and show what was done."""
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
    """Line in Lightning's rich bar while that is drawn, otherwise a separate one: rich allows one display at a time."""

    def __init__(self, callback: RichProgressBar, trainer: pl.Trainer, total: int, description: str) -> None:
        progress: Progress | None = callback.progress
        self._callback = callback if progress is not None and progress.live.is_started else None
        if progress is None or self._callback is None:
            progress = Progress(*callback.configure_columns(trainer), transient=True, disable=callback.is_disabled)
            progress.start()
        self._progress = progress
        self._description = description
        self._task = self._progress.add_task(description, total=total)

    def set_postfix_str(self, s: str, refresh: bool) -> None:
        self._progress.update(self._task, description=f"{self._description} {escape(s)}")

    def update(self, n: int) -> None:
        self._progress.update(self._task, advance=n)
        if self._callback is not None:
            self._callback.refresh()

    def close(self) -> None:
        if self._callback is None:
            self._progress.stop()
        else:
            # Hidden rather than removed, since Lightning identifies its tasks by position.
            self._progress.update(self._task, visible=False)
            self._progress.refresh()
