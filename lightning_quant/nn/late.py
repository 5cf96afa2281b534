"""Networks that do not exist yet: a LightningModule may build its own in ``setup`` or in ``configure_model``."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn


def builds_late(module: nn.Module) -> bool:
    """Whether a module may get layers after Lightning has called ``setup`` of the callbacks.

    Example:
        >>> builds_late(pl.LightningModule())
        False
    """
    hooks = ("setup", "configure_model")
    return isinstance(module, pl.LightningModule) and any(is_overridden(hook, module) for hook in hooks)


def after_setup(module: pl.LightningModule, then: Callable[[], object]) -> None:
    """Call ``then`` once, when the module's own ``setup`` is done and before anything is loaded or optimized.

    Lightning has no hook of callbacks there: it calls theirs before the module's.

    Example:
        >>> module = pl.LightningModule()
        >>> after_setup(module, lambda: print("built"))
        >>> module.setup("fit")
        built
        >>> module.setup("fit")
    """
    cancel_after_setup(module)
    vars(module)["setup"] = _Setup(module, then)


def cancel_after_setup(module: pl.LightningModule) -> None:
    """Undo :func:`after_setup` where the module's ``setup`` was never called."""
    if isinstance(vars(module).get("setup"), _Setup):
        del module.setup


class _Setup:
    """The ``setup`` of one module, followed by something else."""

    def __init__(self, module: pl.LightningModule, then: Callable[[], object]) -> None:
        self.module, self.then = module, then

    def __call__(self, stage: str) -> None:
        cancel_after_setup(self.module)
        self.module.setup(stage)
        self.then()

    def __reduce__(self) -> tuple[object, ...]:
        # A copy of the module, as averaging makes one, is not what the callback waits for.
        return _Setup, (self.module, _nothing)


def _nothing() -> None:
    """What follows the ``setup`` of a copy."""
