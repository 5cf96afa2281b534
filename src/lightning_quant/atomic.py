"""Files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Of this process on this machine: others may write to the same disk.
_HERE = re.sub(r"\W", "-", socket.gethostname())
# What this process is writing now. Others of its number are of one before it: in a container that starts anew both
# have the same.
_WRITING: set[Path] = set()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` when all is written.

    What a killed process of this machine left there is cleared away.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder) / "state.json") as temporary:
    ...         _ = temporary.write_text("{}")
    ...     [path.name for path in Path(folder).iterdir()]
    ['state.json']
    """
    for left in _left(path, "tmp"):
        left.unlink(missing_ok=True)
    temporary = _beside(path, "tmp")
    _WRITING.add(temporary)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        _WRITING.discard(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``path`` when all is written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_folder(Path(folder) / "model") as new:
    ...         _ = (new / "weights").write_text("...")
    ...     [path.name for path in Path(folder).rglob("*")]
    ['model', 'weights']
    """
    target = path.expanduser().resolve()
    settle(target)
    new, old = _beside(target, "new"), _beside(target, "old")
    _WRITING.update((new, old))
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _WRITING.difference_update((new, old))
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def settle(path: Path) -> None:
    """Bring what a killed process of this machine was replacing to its end.

    It had written all of the new folder where it had begun to put the old one aside.
    """
    target = path.expanduser().resolve()
    for old in _left(target, "old"):
        new = old.with_suffix(".new")
        # On a disk that nobody may write to, it stays as it is.
        with suppress(OSError):
            if not target.exists():
                (new if new.exists() else old).rename(target)
    for left in [*_left(target, "old"), *_left(target, "new")]:
        shutil.rmtree(left, ignore_errors=True)


def left_elsewhere(path: Path) -> list[Path]:
    """What processes of other machines have left beside a path, or are writing there now."""
    target = path.expanduser().resolve()
    return [other for other in _beside_it(target) if other.suffix in (".new", ".old")]


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{_HERE}.{os.getpid()}.{word}")


def _left(path: Path, word: str) -> list[Path]:
    """What processes of this machine that are no more have left beside a path."""
    start = f".{path.name}.{_HERE}."
    found = [other for other in _beside_it(path) if other.name.startswith(start) and other.suffix == f".{word}"]
    return [other for other in found if not _is_written(other, other.name.removeprefix(start).split(".")[0])]


def _beside_it(path: Path) -> list[Path]:
    # Not by glob: names may hold its characters. A folder that may be read may not be one that may be listed.
    with suppress(OSError):
        return [other for other in path.parent.iterdir() if other.name.startswith(f".{path.name}.")]
    return []


def _is_written(left: Path, process: str) -> bool:
    if process == str(os.getpid()):
        return left in _WRITING
    # On Windows signal 0 is one.
    if not process.isdigit() or os.name == "nt":
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
