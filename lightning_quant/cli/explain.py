"""The parser's nested messages, cut down to the option, the reason and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import signature
from textwrap import shorten

from lightning_quant.cli.advice import VERBS, did_you_mean

_VERB = "|".join(VERBS)
# Lines by which jsonargparse walks through a union; the reason is in the others.
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a <class '(NoneType|list)'>"
    r"|Expected a path but|Not a valid subclass of|Subclass types expect|a (class path|dict with)"
    r"|Parser key|Problem with given class_path|$"
)
_KEY = re.compile(r'Parser key "(.+?)"')
_CLASS = re.compile(r"Problem with given class_path '(.+?)'")
_KIND = re.compile(r"does not correspond to a subclass of (\w+)")
_GIVEN = re.compile(r"Given value: ([\w.]+)$", re.MULTILINE)
_GROUP = re.compile(r"Group '([\w.]+)' does not accept (?:option|nested key) '")
_NO_KIND = re.compile(r"Not a valid subclass of (\w+)")
_FOUND = re.compile(r"Given value: (.+)", re.DOTALL)
_SUBTYPES = re.compile(r"Subtypes: (.+)")
_SUBTYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
# What Python calls a type, and how it is written on a command line.
_SPOKEN = (
    (re.compile(r"a typing\.Literal\[([^,]+)\]"), r"\1"),
    (re.compile(r"a typing\.Literal\[(.+)\]"), r"one of \1"),
    (re.compile(r"a <class 'collections\.abc\.Sequence'>\. Got value: (\S+)"), r"a list, as '[\1]'"),
)


def explain(message: str, classes: Iterable[str] = (), options: Iterable[str] = ()) -> str:
    r"""One sentence for what jsonargparse says.

    Args:
        message: The text of the parser's error, with its walk through unions.
        classes: Names that could have been meant where a class is unknown.
        options: Names that could have been meant where an option is unknown.

    Example:
        >>> explain("Parser key \"model\":\n  - Expected a dot import path string: Clasifier", ["Classifier"])
        '--model: there is no class Clasifier (did you mean Classifier?).'
    """
    message = _GROUP.sub(r"does not accept option '\1.", message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    key = ".".join(match[1] for line in lines if (match := _KEY.match(line)))
    owner = next((match[1] for line in reversed(lines) if (match := _CLASS.search(line))), "")
    given = match[1] if (match := _GIVEN.search(message)) else ""
    reasons = _reasons(lines) or [_nothing_fits(message, lines)]
    for pattern, answer in _ANSWERS:
        for reason in reasons:
            if found := re.search(pattern, reason):
                text = answer(found[1], owner or given, key, _Known(classes, options, _expected(lines)))
                return f"--{key}: {text}" if key else text
    return (f"--{key}: " if key else "") + "; ".join(reasons)


def _reasons(lines: list[str]) -> list[str]:
    """What is wrong; that other classes of the union do not fit says something only if none does."""
    lines = list(dict.fromkeys(line for line in lines if not _NOISE.match(line)))
    others = [line for line in lines if not _KIND.search(line)]
    kinds = list(dict.fromkeys(match[1] for line in lines if (match := _KIND.search(line))))
    if others:
        return [_spoken(line) for line in others]
    return [f"does not correspond to a subclass of {' or '.join(kinds)}"] if lines else []


def _nothing_fits(message: str, lines: list[str]) -> str:
    """What to say where each line is of the walk through a union."""
    kinds = list(dict.fromkeys(match[1] for line in lines if (match := _NO_KIND.search(line))))
    if not kinds:
        return "; ".join(line for line in lines if line) or message.strip()
    found = _FOUND.search(message)
    given = f", found {shorten(found[1].strip(), 80)}" if found else ""
    return f"expected class_path with the name of a {' or '.join(kinds)}, and init_args{given}."


def _spoken(reason: str) -> str:
    for pattern, words in _SPOKEN:
        reason = pattern.sub(words, reason)
    return reason


def _expected(lines: list[str]) -> list[str]:
    """Names of the classes that the innermost option may be of."""
    subtypes = [match[1] for line in lines if (match := _SUBTYPES.match(line))]
    return [name for name in _SUBTYPE.findall(subtypes[-1]) if name != "NoneType"] if subtypes else []


class _Known:
    """What could have been meant."""

    def __init__(self, classes: Iterable[str], options: Iterable[str], expected: Iterable[str]) -> None:
        self.classes = list(classes)
        self.options = list(options)
        self.expected = list(expected)


def _no_class(name: str, owner: str, key: str, known: _Known) -> str:
    if name in known.classes:
        return f"expected a {' or '.join(known.expected) or 'class of another kind'}, found a {name}."
    return f"there is no class {name}{did_you_mean(name, known.classes)}."


def _no_path(name: str, owner: str, key: str, known: _Known) -> str:
    return f"there is no class {owner}{did_you_mean(owner.rpartition('.')[2], known.classes)}."


def _no_name(reason: str, owner: str, key: str, known: _Known) -> str:
    return "class_path takes the name of a class."


def _no_options(reason: str, owner: str, key: str, known: _Known) -> str:
    return "init_args takes options by their names, as init_args: {name: value}."


def _wrong_kind(kind: str, owner: str, key: str, known: _Known) -> str:
    return f"{owner} is not a {kind}."


def _needs(names: str, owner: str, key: str, known: _Known) -> str:
    if not owner:
        plain = re.sub(rf"\b({_VERB})\.", "", names)
        first = plain.split(", ")[0]
        config = "igq_vit/quickstart.yaml" if names.startswith("calibrate.") else "quickstart.yaml"
        return f"Nothing given for {plain}; write --config {config}, or --{first} VALUE."
    short = owner.rpartition(".")[2]
    written = " ".join(f"--{key}.{name} VALUE" for name in names.split(", "))
    return f"{short} needs {names}; write --{key} {short} {written}"


def _class_lacks(name: str, owner: str, key: str, known: _Known) -> str:
    if not owner:
        return _no_option(name, owner, key, known)
    short = owner.rpartition(".")[2]
    return f"{short} has no option {name}{did_you_mean(name, _parameters(owner))}."


def _no_option(name: str, owner: str, key: str, known: _Known) -> str:
    name = re.sub(rf"^(--|({_VERB})\.)", "", name)
    return f"There is no option --{name}{did_you_mean(name, known.options)}."


_ANSWERS: tuple[tuple[str, Callable[[str, str, str, _Known], str]], ...] = (
    (r"the following arguments are required: (.+)", _needs),
    (r"Key ['\"](.+?)['\"] is required", _needs),  # as jsonargparse 4.39 puts it
    (r"Option '(.+)' is not accepted", _class_lacks),
    (r"Key '(.+?)' is not expected", _class_lacks),  # as jsonargparse 4.39 puts it
    (r"Expected a dot import path string: (.+)", _no_class),
    (r"No module named '(.+)'", _no_path),
    (r"module '.+' has no attribute '(.+)'", _no_path),
    (r"^(unhashable type: |argument of type '\w+' is not )", _no_name),
    (r"object has no attribute '(keys)'", _no_options),
    (r"does not correspond to a subclass of (.+)", _wrong_kind),
    (r"does not accept (?:option|nested key) '(.+)'", _no_option),
    (r"[Uu]nrecognized arguments: (--[\w.+-]+)", _no_option),
)


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
