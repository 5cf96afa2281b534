"""Atomic writing of files and folders: they are complete or absent, even if the process is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from lightning.pytorch.utilities import rank_zero_warn

from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.paths import check_writable

# This machine: others may write to the same disk.
_HERE = re.sub(r"\W", "-", socket.gethostname())
# Temporary paths that this process is writing. Others with its process number are left from an earlier process, since
# a restarted container reuses the number.
_WRITING: set[Path] = set()
# diffusers ignores keys with this prefix.
_LISTED = "_lightning_quant"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Provide a temporary path to write to, which is renamed to ``path`` once it is complete.

    Temporary files that killed processes of this machine left there are deleted.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder) / "state.json") as temporary:
        ...         _ = temporary.write_text("{}")
        ...     [path.name for path in Path(folder).iterdir()]
        ['state.json']
    """
    for leftover in _leftovers(path, "tmp"):
        leftover.unlink(missing_ok=True)
    temporary = _beside(path, "tmp")
    _WRITING.add(temporary)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        _WRITING.discard(temporary)
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Writer:
    """Description of a function that writes a whole folder, and may replace only what it wrote before.

    Attributes:
        name: Name of the function for messages.
        written: Function that returns the files that were written into a folder, relative to it, as listed there.
        index: Name of the file with that list.
    """

    name: str
    written: Callable[[Path], Iterable[str]]
    index: str

    def foreign(self, folder: Path) -> list[str]:
        """Return all files below a folder that the function did not write, and folders without any of its files."""
        if folder.is_symlink() or not folder.is_dir():
            return [folder.name]
        written = {PurePath(name) for name in self.written(folder)}
        written |= {parent for name in written for parent in name.parents}
        try:
            return sorted(str(name) for name in _below(folder) if name not in written)
        except OSError:
            # A folder that cannot be listed is foreign.
            return [folder.name]


def list_files(folder: Path, index: str) -> None:
    """List the files of a folder in one of its JSON files, for :func:`listed_files`.

    Args:
        folder: Folder that has just been written.
        index: Name of the JSON file, which holds an object.
    """
    names = sorted(name.as_posix() for name in _below(folder) if not (folder / name).is_dir())
    content = {**json.loads((folder / index).read_text(encoding="utf-8")), _LISTED: {"files": names}}
    (folder / index).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def listed_files(folder: Path, index: str) -> list[str]:
    """Return the files that :func:`list_files` listed, or an empty list if there is no list.

    Example:
        >>> listed_files(Path("no-such-folder"), "model_index.json")
        []
    """
    try:
        return [str(name) for name in json.loads((folder / index).read_text(encoding="utf-8"))[_LISTED]["files"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def check_replaceable(path: Path, writer: Writer) -> None:
    """Raise an error if a folder cannot be written, or if replacing it would delete something else.

    Args:
        path: Folder as :func:`~lightning_quant.utilities.paths.user_path` returns it.
        writer: Writer of the folder.

    Raises:
        ConfigurationError: The folder holds other files, is a home, working or mount folder, or cannot be created.
    """
    settle(path, writer)
    if not os.path.lexists(path):
        check_writable(path)
        return
    # The folder is moved aside rather than written to.
    check_writable(path.parent)
    if not path.is_dir():
        raise ConfigurationError(f"{path} is a file: write a new folder, or one that {writer.name} wrote.")
    _check_foreign(path, path, writer)
    if _is_in_use(path):
        raise ConfigurationError(
            f"{path} is the home folder, the working directory or a mounted disk, which cannot be replaced: write a"
            f" folder inside it, such as {path / 'quantized'}."
        )


@contextmanager
def whole_folder(path: Path, writer: Writer) -> Iterator[Path]:
    """Provide an empty folder to write into, which replaces ``path`` once it is complete.

    The old folder is moved aside first, and moved back if it holds files that the writer did not write.

    Args:
        path: Folder as :func:`~lightning_quant.utilities.paths.user_path` returns it.
        writer: Writer of the folder.

    Raises:
        ConfigurationError: See :func:`check_replaceable`. Checked at the start and again at the end.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_folder(Path(folder) / "model", Writer("save", lambda folder: ["weights"], "weights")) as new:
        ...         _ = (new / "weights").write_text("...")
        ...     [path.name for path in Path(folder).rglob("*")]
        ['model', 'weights']
    """
    check_replaceable(path, writer)
    new, old = _beside(path, "new"), _beside(path, "old")
    _WRITING.update((new, old))
    try:
        new.mkdir(parents=True)
        yield new
        if os.path.lexists(path):
            path.rename(old)
            # Under its new name, no other process can write into it any more.
            _check_foreign(old, path, writer)
        new.rename(path)
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        _WRITING.difference_update((new, old))
        shutil.rmtree(new, ignore_errors=True)
        _remove(old, writer)


def settle(path: Path, writer: Writer) -> None:
    """Finish the replacement of a folder that a killed process of this machine had started.

    If the old folder was already moved aside, the new one was complete.
    """
    for old in _leftovers(path, "old"):
        new = old.with_suffix(".new")
        # On a read-only disk everything stays as it is.
        with suppress(OSError):
            if not path.exists():
                (new if new.exists() and not writer.foreign(old) else old).rename(path)
    for leftover in _leftovers(path, "old"):
        _remove(leftover, writer)
    for leftover in _leftovers(path, "new"):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_in_use(path: Path) -> bool:
    fixed = [Path()]
    with suppress(RuntimeError):  # a user without a home folder
        fixed.append(Path.home())
    return os.path.ismount(path) or any(folder.exists() and folder.samefile(path) for folder in fixed)


def _check_foreign(folder: Path, path: Path, writer: Writer) -> None:
    """Raise an error if a folder, which is or was at ``path``, holds files that the writer did not write."""
    if foreign := writer.foreign(folder):
        shown = ", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if len(foreign) > 4 else "")
        raise ConfigurationError(
            f"{path} contains {shown}, which saving would overwrite: write a new or an empty folder, or one that"
            f" {writer.name} wrote."
        )


def _remove(old: Path, writer: Writer) -> None:
    """Delete the writer's files one by one, so that files added by others since then remain."""
    if not os.path.lexists(old):
        return
    names = set() if writer.foreign(old) else {PurePath(name) for name in writer.written(old)}
    folders = {parent for name in names for parent in name.parents} - {PurePath()}
    with suppress(OSError):
        for name in sorted(names - {PurePath(writer.index)}):
            (old / name).unlink(missing_ok=True)
        for name in sorted(folders, key=lambda folder: -len(folder.parts)):
            with suppress(FileNotFoundError):
                (old / name).rmdir()
        # The index goes last, so that the next start can continue if this one is killed.
        if names:
            (old / writer.index).unlink(missing_ok=True)
        old.rmdir()
    if os.path.lexists(old):
        rank_zero_warn(f"{old} remains of a folder that {writer.name} replaced, since it contains other files.")


def _below(folder: Path) -> Iterator[PurePath]:
    """Iterate over all files and folders below a folder, relative to it, without following links."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(root, name).relative_to(folder) for name in (*folders, *files))


def left_elsewhere(path: Path) -> list[Path]:
    """Return the folders beside a path that processes of other machines left there or are still writing."""
    return [sibling for sibling in _siblings(path) if sibling.suffix in (".new", ".old")]


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{_HERE}.{os.getpid()}.{word}")


def _leftovers(path: Path, word: str) -> list[Path]:
    """Return the files or folders that dead processes of this machine left beside a path."""
    start = f".{path.name}.{_HERE}."
    candidates = [other for other in _siblings(path) if other.name.startswith(start) and other.suffix == f".{word}"]
    return [other for other in candidates if not _is_written(other, other.name.removeprefix(start).split(".")[0])]


def _siblings(path: Path) -> list[Path]:
    # Not by glob, since names may contain its special characters. Listing the folder may not be permitted.
    with suppress(OSError):
        return [other for other in path.parent.iterdir() if other.name.startswith(f".{path.name}.")]
    return []


def _is_written(leftover: Path, process: str) -> bool:
    if process == str(os.getpid()):
        return leftover in _WRITING
    # On Windows, signal 0 is a real signal.
    if not process.isdigit() or os.name == "nt":
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
