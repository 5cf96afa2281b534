"""The language of the docstrings, where ruff's rules do not reach."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_quant

PACKAGE = Path(lightning_quant.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# An entry begins with the noun that it is; "Whether" stands for one.
NO_NOUN = re.compile(
    r"(about|above|after|against|among|around|as|at|because|before|below|beside|between|beyond|by|during|for|from|how|if|in"
    r"|inside|into|like|of|off|on|onto|out|over|per|since|so|than|that|through|to|toward|under|until|unless|via|what|when"
    r"|where|which|who|whose|why|with|within|without)",
    re.IGNORECASE,
)
SECTIONS = {"Args:", "Attributes:", "Returns:", "Raises:", "Yields:"}


def docstrings(path: Path) -> Iterator[tuple[str, ast.AST, str]]:
    """Name, node and text of every docstring of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", path.name), node, text


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of every entry of the sections of a docstring; what is returned has no name."""
    section, name, parts = "", "", list[str]()
    for line in [*text.splitlines(), "Args:"]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and (indent == 0 or (indent == 4 and section not in ("", "Returns:", "Yields:"))) and parts:
            yield name, " ".join(parts)
            parts = []
        if indent == 0 and line.strip():
            section = line.strip() if line.strip() in SECTIONS else ""
        elif section in ("Returns:", "Yields:") and line.strip():
            name, parts = section, [*parts, line.strip()]
        elif section and indent == 4:
            name, _, rest = line.strip().partition(": ")
            parts = [rest.strip()]
        elif section and line.strip():
            parts.append(line.strip())


def faults(path: Path) -> Iterator[str]:
    """What is wrong with the docstrings of a file, one line each."""
    for name, node, text in docstrings(path):
        where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 1)} {name}"
        first = text.splitlines()[0]
        if isinstance(node, ast.Module) and first.split()[0] in ("What", "How", "Which", "Where", "When", "Why"):
            yield f"{where}: a module is a noun phrase: {first}"
        if ">>>" in text and not re.search(r"^Examples?:$", text, re.MULTILINE):
            yield f"{where}: a doctest stands under 'Example:'"
        for entry, words in entries(text):
            word = words.split()[0].strip(",;:") if words.split() else ""
            if NO_NOUN.fullmatch(word):
                yield f"{where}: {entry!r} begins with {word!r}, not with the noun that it is: {words[:60]}"
            elif not re.match(r"[A-Z0-9`\"'(\[{<*~+-]", words):
                yield f"{where}: {entry!r} begins without a capital: {words[:60]}"
            if not words.rstrip().endswith((".", ":", "```")):
                yield f"{where}: {entry!r} ends without a full stop: ...{words[-40:]}"


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(PACKAGE).as_posix() for path in FILES])
def test_docstrings_read_as_the_rules_say(path: Path) -> None:
    assert not list(faults(path))


def test_the_check_sees_each_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    source = tmp_path / "bad.py"
    lines = ['"""What a file is."""', "", "def f(x):", '    """Do it.', "", "    Args:", "        x: of the layer."]
    lines += ["        y: lower", "", "    Returns:", "        with a preposition.", "", "    >>> f(1)", '    """']
    source.write_text("\n".join(lines), encoding="utf-8")
    assert len(list(faults(source))) == 6
