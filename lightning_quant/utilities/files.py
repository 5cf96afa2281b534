"""Files and folders that are there whole or not at all, whenever the process is killed."""

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

# Of this process on this machine: others may write to the same disk.
_HERE = re.sub(r"\W", "-", socket.gethostname())
# What this process is writing now. Others of its number are of one before it: in a container that starts anew both
# have the same.
_WRITING: set[Path] = set()
# Diffusers reads over names that begin so.
_LISTED = "_lightning_quant"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` when all is written.

    What a killed process of this machine left there is cleared away.

    Example:
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


@dataclass(frozen=True)
class Writer:
    """A function that writes a folder whole, and may replace only what it wrote before.

    Attributes:
        name: Name of the function, for messages.
        written: Returns the files that the function wrote into a folder, relative to it, as the folder itself says.
        index: Name of the file by which the folder says so.
    """

    name: str
    written: Callable[[Path], Iterable[str]]
    index: str

    def foreign(self, folder: Path) -> list[str]:
        """Files in a folder, or below it, that the function did not write, and folders without any of its files."""
        if folder.is_symlink() or not folder.is_dir():
            return [folder.name]
        own = {PurePath(name) for name in self.written(folder)}
        own |= {parent for name in own for parent in name.parents}
        try:
            return sorted(str(name) for name in _below(folder) if name not in own)
        except OSError:
            # What may not be looked at is not ours.
            return [folder.name]


def list_files(folder: Path, index: str) -> None:
    """Note in a JSON file of a folder which files are in it, for :func:`listed_files`.

    Args:
        folder: Folder that was just written.
        index: Name of the JSON file, an object.
    """
    names = sorted(name.as_posix() for name in _below(folder) if not (folder / name).is_dir())
    content = {**json.loads((folder / index).read_text(encoding="utf-8")), _LISTED: {"files": names}}
    (folder / index).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def listed_files(folder: Path, index: str) -> list[str]:
    """Return the files that :func:`list_files` noted; none where there is no such note.

    Example:
        >>> listed_files(Path("no-such-folder"), "model_index.json")
        []
    """
    try:
        return [str(name) for name in json.loads((folder / index).read_text(encoding="utf-8"))[_LISTED]["files"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def check_replaceable(path: Path, writer: Writer) -> None:
    """Raise where a folder cannot be written whole, or something would be lost by replacing it.

    Args:
        path: Folder as :func:`~lightning_quant.utilities.paths.user_path` returns it.
        writer: Writes it.

    Raises:
        ConfigurationError: A folder that holds other files, is in use as a place in the file system, or cannot be made.
    """
    settle(path, writer)
    if not os.path.lexists(path):
        check_writable(path)
        return
    # It is put aside, and not written to.
    check_writable(path.parent)
    if not path.is_dir():
        raise ConfigurationError(f"{path} is a file: give a new folder, or one that {writer.name} wrote.")
    _check_foreign(path, path, writer)
    if _is_in_use(path):
        raise ConfigurationError(
            f"{path} is the home folder, the working directory or a mounted disk, which cannot be replaced: give a"
            f" folder in it, as {path / 'quantized'}."
        )


@contextmanager
def whole_folder(path: Path, writer: Writer) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``path`` when all is written.

    What it replaces is moved aside first, and put back where it holds what the writer did not write.

    Args:
        path: Folder as :func:`~lightning_quant.utilities.paths.user_path` returns it.
        writer: Writes it.

    Raises:
        ConfigurationError: See :func:`check_replaceable`, at the beginning and again at the end.

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
            # Nobody who looks for the folder by its name can write into it any more.
            _check_foreign(old, path, writer)
        new.rename(path)
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        _WRITING.difference_update((new, old))
        shutil.rmtree(new, ignore_errors=True)
        _remove(old, writer)


def settle(path: Path, writer: Writer) -> None:
    """Bring what a killed process of this machine was replacing to its end.

    It had written all of the new folder where it had begun to put the old one aside.
    """
    for old in _left(path, "old"):
        new = old.with_suffix(".new")
        # On a disk that nobody may write to, it stays as it is.
        with suppress(OSError):
            if not path.exists():
                (new if new.exists() and not writer.foreign(old) else old).rename(path)
    for left in _left(path, "old"):
        _remove(left, writer)
    for left in _left(path, "new"):
        shutil.rmtree(left, ignore_errors=True)


def _is_in_use(path: Path) -> bool:
    fixed = [Path()]
    with suppress(RuntimeError):  # who has no home
        fixed.append(Path.home())
    return os.path.ismount(path) or any(each.exists() and each.samefile(path) for each in fixed)


def _check_foreign(folder: Path, path: Path, writer: Writer) -> None:
    """Raise where a folder, which was or is at ``path``, holds what the writer did not write."""
    if others := writer.foreign(folder):
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        raise ConfigurationError(
            f"{path} holds {shown}, which saving would overwrite: give a new or an empty folder, or one that"
            f" {writer.name} wrote."
        )


def _remove(old: Path, writer: Writer) -> None:
    """Take away what the writer wrote, file by file: what somebody put there since then stays."""
    if not os.path.lexists(old):
        return
    names = set() if writer.foreign(old) else {PurePath(name) for name in writer.written(old)}
    folders = {parent for name in names for parent in name.parents} - {PurePath()}
    with suppress(OSError):
        for name in sorted(names - {PurePath(writer.index)}):
            (old / name).unlink(missing_ok=True)
        for name in sorted(folders, key=lambda each: -len(each.parts)):
            with suppress(FileNotFoundError):
                (old / name).rmdir()
        # Last, so that the next start can go on where this one is killed.
        if names:
            (old / writer.index).unlink(missing_ok=True)
        old.rmdir()
    if os.path.lexists(old):
        rank_zero_warn(f"{old} is left of a folder that {writer.name} replaced: it holds files of somebody else.")


def _below(folder: Path) -> Iterator[PurePath]:
    """Files and folders below a folder, relative to it; links are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(root, name).relative_to(folder) for name in (*folders, *files))


def left_elsewhere(path: Path) -> list[Path]:
    """What processes of other machines have left beside a path, or are writing there now."""
    return [other for other in _beside_it(path) if other.suffix in (".new", ".old")]


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
