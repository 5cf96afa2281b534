"""Networks that a LightningModule builds late, in ``setup`` or ``configure_model``."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn


def builds_late(module: nn.Module) -> bool:
    """Return whether a module may get layers after Lightning calls ``setup`` of the callbacks.

    Example:
        >>> builds_late(pl.LightningModule())
        False
    """
    hooks = ("setup", "configure_model")
    return isinstance(module, pl.LightningModule) and any(is_overridden(hook, module) for hook in hooks)


def after_setup(module: pl.LightningModule, then: Callable[[], object]) -> None:
    """Call ``then`` once, after the module's own ``setup`` and before anything is loaded or optimized.

    Lightning has no callback hook there: it calls ``setup`` of the callbacks before that of the module.

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
    """Undo :func:`after_setup` if the module's ``setup`` was never called."""
    if isinstance(vars(module).get("setup"), _Setup):
        del module.setup


class _Setup:
    """Wrapper of a module's ``setup`` that calls a function afterwards."""

    def __init__(self, module: pl.LightningModule, then: Callable[[], object]) -> None:
        self.module, self.then = module, then

    def __call__(self, stage: str) -> None:
        cancel_after_setup(self.module)
        self.module.setup(stage)
        self.then()

    def __reduce__(self) -> tuple[object, ...]:
        # The callback does not wait for a copy of the module, such as one for weight averaging.
        return _Setup, (self.module, _nothing)


def _nothing() -> None:
    """Do nothing after the ``setup`` of a copy."""
