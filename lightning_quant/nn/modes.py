"""Execution modes of networks: eager execution of compiled networks, and evaluation mode."""

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
    """Run compiled modules eagerly, and have them compiled again afterwards with their new layers.

    Code compiled earlier would continue to use the old layers and the uninitialized quantizers.

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
    """Wrap a hook so that it always runs eagerly, even in a compiled network.

    Example:
        >>> never_compiled(len)([1, 2])
        2
    """
    return torch.compiler.disable(hook) if _imported() else hook


def untraced(function: Callable[P, R], when: Callable[..., bool] | None = None) -> Callable[P, R]:
    """Decorate a function that sets state in forward or backward: a compiled network calls it without tracing it.

    Args:
        function: Function or method.
        when: Function of the same arguments that returns False for a call that sets no state and may be traced.
            Default: no call is traced.

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
            # Only when called, since this imports the compiler, which takes seconds (every optimizer imports it).
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


def _imported() -> bool:
    """Return whether the compiler is imported. If not, nothing was compiled, and importing it takes seconds."""
    return "torch._dynamo" in sys.modules


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Set the network to evaluation mode, and restore the mode of each module afterwards.

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
