"""The order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run compiled networks last: their backward may start threads, from which forked ranks cannot go on."""
    items.sort(key=lambda item: item.path.name == "test_compile.py")
