"""The order of the tests, and their threads."""

from __future__ import annotations

import os

# Before PyTorch is imported, and for the processes that tests start: their networks are too small for a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run compiled networks last: their backward may start threads, from which forked ranks cannot go on."""
    items.sort(key=lambda item: item.path.name == "test_compile.py")
