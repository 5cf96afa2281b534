"""Networks that ``torch.compile`` was called on, while their layers are exchanged and their quantizers begin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def eager_execution() -> Iterator[None]:
    """Run compiled modules as they are written, and let them be compiled anew afterwards, with the layers of then.

    What was compiled before would go on with the layers and the empty quantizers that it has seen.

    Example:
        >>> with eager_execution():
        ...     y = torch.compile(torch.nn.Linear(2, 2))(torch.ones(1, 2))
    """
    if not _imported():
        yield
        return
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.compiler.reset()


def never_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for a network that may be compiled, which runs as it is written in any case.

    Example:
        >>> never_compiled(len)([1, 2])
        2
    """
    return torch.compiler.disable(hook) if _imported() else hook


def untraced(function: Callable[P, R], when: Callable[..., bool] | None = None) -> Callable[P, R]:
    """Decorate what sets state in a forward or a backward: a compiled network calls it and does not trace it.

    Args:
        function: Function or method.
        when: Function of the same arguments, false for a call that sets no state and may be traced. Default: none may.

    Example:
        >>> untraced(len)([1, 2])
        2
    """
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if when is not None and not when(*args, **kwargs):
            return function(*args, **kwargs)
        if disabled is None:
            # Not where it is defined: this imports the compiler, which takes seconds (every optimizer does).
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


def _imported() -> bool:
    """Nothing was compiled where the compiler was never imported, which takes seconds."""
    return "torch._dynamo" in sys.modules


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; afterwards each module in the mode that it had.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(network):
        ...     network[0].training
        False
        >>> [module.training for module in network]
        [True, False]
    """
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
