"""The messages that the documentation explains are those of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightning_quant

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"


def texts() -> list[str]:
    """All strings of the package, with a character that no message has in place of each value."""
    found = []
    for path in Path(lightning_quant.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts()
ROWS = re.findall(r"^\| (`.*?)\s*\|", PAGE.read_text(encoding="utf-8").partition("## Questions")[0], re.MULTILINE)
MESSAGES = [message for row in ROWS for message in re.findall(r"`([^`]+)`", row)]


def is_said(message: str) -> bool:
    """Whether a string of the package has the parts of a message, between which `...` stands for anything."""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip(" .'\"=()")]
    return any(re.search(".*?".join(parts), text, re.DOTALL) for text in TEXTS)


def test_there_are_messages_to_check() -> None:
    assert len(MESSAGES) > 30


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_said(message: str) -> None:
    assert is_said(message), f"docs/troubleshooting.md explains {message!r}, which no string of the package says"


def test_the_check_sees_a_message_that_nothing_says() -> None:
    assert not is_said("... is a sentence that nobody ... ever wrote")
