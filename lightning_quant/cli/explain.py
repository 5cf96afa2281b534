"""Reduction of the parser's nested messages to the option, the reason and the line to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import signature
from textwrap import shorten

from lightning_quant.cli.advice import VERBS, did_you_mean

_VERB = "|".join(VERBS)
# Lines in which jsonargparse lists the members of a union; the reason is in the others.
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
# Python's name of a type, and how its value is written on a command line.
_SPOKEN = (
    (re.compile(r"a typing\.Literal\[([^,]+)\]"), r"\1"),
    (re.compile(r"a typing\.Literal\[(.+)\]"), r"one of \1"),
    (re.compile(r"a <class 'collections\.abc\.Sequence'>\. Got value: (\S+)"), r"a list, as '[\1]'"),
)


def explain(message: str, classes: Iterable[str] = (), options: Iterable[str] = ()) -> str:
    r"""Reduce an error of jsonargparse to one sentence.

    Args:
        message: Text of the parser's error, including the members of unions.
        classes: Candidate names for an unknown class.
        options: Candidate names for an unknown option.

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
            if match := re.search(pattern, reason):
                text = answer(match[1], owner or given, key, _Candidates(classes, options, _expected(lines)))
                return f"--{key}: {text}" if key else text
    return (f"--{key}: " if key else "") + "; ".join(reasons)


def _reasons(lines: list[str]) -> list[str]:
    """Return the reasons of the error; mismatches with classes of a union count only if there is no other reason."""
    lines = list(dict.fromkeys(line for line in lines if not _NOISE.match(line)))
    others = [line for line in lines if not _KIND.search(line)]
    kinds = list(dict.fromkeys(match[1] for line in lines if (match := _KIND.search(line))))
    if others:
        return [_spoken(line) for line in others]
    return [f"does not correspond to a subclass of {' or '.join(kinds)}"] if lines else []


def _nothing_fits(message: str, lines: list[str]) -> str:
    """Return the reason if all lines list members of a union."""
    kinds = list(dict.fromkeys(match[1] for line in lines if (match := _NO_KIND.search(line))))
    if not kinds:
        return "; ".join(line for line in lines if line) or message.strip()
    match = _FOUND.search(message)
    given = f", found {shorten(match[1].strip(), 80)}" if match else ""
    return f"expected class_path, the name of a {' or '.join(kinds)}, and init_args{given}."


def _spoken(reason: str) -> str:
    for pattern, words in _SPOKEN:
        reason = pattern.sub(words, reason)
    return reason


def _expected(lines: list[str]) -> list[str]:
    """Return the names of the classes that the innermost option accepts."""
    subtypes = [match[1] for line in lines if (match := _SUBTYPES.match(line))]
    return [name for name in _SUBTYPE.findall(subtypes[-1]) if name != "NoneType"] if subtypes else []


class _Candidates:
    """Names that the user may have meant."""

    def __init__(self, classes: Iterable[str], options: Iterable[str], expected: Iterable[str]) -> None:
        self.classes = list(classes)
        self.options = list(options)
        self.expected = list(expected)


def _no_class(name: str, owner: str, key: str, candidates: _Candidates) -> str:
    if name in candidates.classes:
        return f"expected {' or '.join(candidates.expected) or 'a class of another kind'}, found {name}."
    return f"there is no class {name}{did_you_mean(name, candidates.classes)}."


def _no_path(name: str, owner: str, key: str, candidates: _Candidates) -> str:
    return f"there is no class {owner}{did_you_mean(owner.rpartition('.')[2], candidates.classes)}."


def _no_name(reason: str, owner: str, key: str, candidates: _Candidates) -> str:
    return "class_path expects the name of a class."


def _no_options(reason: str, owner: str, key: str, candidates: _Candidates) -> str:
    return "init_args expects options by name, as init_args: {name: value}."


def _wrong_kind(kind: str, owner: str, key: str, candidates: _Candidates) -> str:
    return f"{owner} is not a {kind}."


def _needs(names: str, owner: str, key: str, candidates: _Candidates) -> str:
    if not owner:
        plain = re.sub(rf"\b({_VERB})\.", "", names)
        first = plain.split(", ")[0]
        config = "igq_vit/quickstart.yaml" if names.startswith("calibrate.") else "quickstart.yaml"
        return f"{plain} is missing; write --config {config}, or --{first} VALUE."
    short = owner.rpartition(".")[2]
    written = " ".join(f"--{key}.{name} VALUE" for name in names.split(", "))
    return f"{short} needs {names}; write --{key} {short} {written}"


def _class_lacks(name: str, owner: str, key: str, candidates: _Candidates) -> str:
    if not owner:
        return _no_option(name, owner, key, candidates)
    short = owner.rpartition(".")[2]
    return f"{short} has no option {name}{did_you_mean(name, _parameters(owner))}."


def _no_option(name: str, owner: str, key: str, candidates: _Candidates) -> str:
    name = re.sub(rf"^(--|({_VERB})\.)", "", name)
    return f"There is no option --{name}{did_you_mean(name, candidates.options)}."


_ANSWERS: tuple[tuple[str, Callable[[str, str, str, _Candidates], str]], ...] = (
    (r"the following arguments are required: (.+)", _needs),
    (r"Key ['\"](.+?)['\"] is required", _needs),  # jsonargparse 4.39
    (r"Option '(.+)' is not accepted", _class_lacks),
    (r"Key '(.+?)' is not expected", _class_lacks),  # jsonargparse 4.39
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
