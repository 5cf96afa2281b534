"""The settings of a calibration: checked, compared, and built from the arguments of its callback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, get_args

from lightning_quant.errors import ConfigurationError
from lightning_quant.nn.selection import Patterns

T = TypeVar("T")


@dataclass(frozen=True)
class CalibrationSettings:
    """Base class of the settings of a method, a frozen dataclass with a field ``exclude``."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for fingerprints and JSON."""
        values = asdict(self)
        return values | {"exclude": list(values["exclude"])}

    def check_choices(self, **choices: Any) -> None:
        """Check settings that have a few values to choose from.

        Args:
            choices: Literal type of each setting, by its name.

        Raises:
            ConfigurationError: Value that its Literal does not have.
        """
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                expected = ", ".join(map(repr, get_args(literal)))
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected one of {expected}.")


def common_value(values: set[int], expected: int) -> int | list[int]:
    """Return the only value, the sorted values if there are several, or the expected one if there are none.

    Example:
        >>> common_value({4}, 8), common_value({6, 4}, 8), common_value(set(), 8)
        (4, [4, 6], 8)
    """
    return next(iter(values)) if len(values) == 1 else sorted(values) or expected


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
