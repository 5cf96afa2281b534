"""Temporary replacement of attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replaced_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of an object or class, and restore it afterwards.

    Args:
        owner: Object or class. An attribute that it inherits is inherited again afterwards.
        name: Name of the attribute.
        value: Value of the attribute inside the context.

    Example:
        >>> class Network:
        ...     def forward(self):
        ...         return "float"
        >>> network = Network()
        >>> with replaced_attribute(network, "forward", lambda: "recorded"):
        ...     network.forward()
        'recorded'
        >>> network.forward(), vars(network)
        ('float', {})
    """
    before = vars(owner).copy()
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in before:
            setattr(owner, name, before[name])
        else:
            delattr(owner, name)
