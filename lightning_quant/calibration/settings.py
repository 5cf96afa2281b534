"""The settings of a calibration, out of the arguments of the callback that has them in its signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from lightning_quant.nn.selection import Patterns

T = TypeVar("T")


def settings_of_arguments(kind: type[T], arguments: Mapping[str, Any]) -> T:
    """Build a dataclass of settings from the arguments that it has a field for.

    Args:
        kind: Dataclass of the settings, with a field ``exclude``.
        arguments: Arguments by name, such as ``locals()`` of a constructor; others are left out.

    Example:
        >>> from lightning_quant.igq_vit.settings import Settings
        >>> settings = settings_of_arguments(Settings, {"groups": 4, "exclude": "head", "cache_dir": "states"})
        >>> settings.groups, settings.exclude
        (4, ('head',))
    """
    chosen = {field.name: arguments[field.name] for field in fields(kind) if field.name in arguments}  # type: ignore[arg-type]
    return kind(**{**chosen, "exclude": _as_tuple(arguments.get("exclude"))})


def _as_tuple(patterns: Patterns) -> tuple[str, ...]:
    if patterns is None:
        return ()
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
