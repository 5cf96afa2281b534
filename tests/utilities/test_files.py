"""Files and folders that are whole or not there, whatever happened to the process before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities import files as atomic
from lightning_quant.utilities.files import Writer, left_elsewhere, settle, whole_file, whole_folder

WRITER = Writer("save", lambda folder: ["weights"], "weights")


def write(folder: Path, text: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    with whole_folder(folder, WRITER) as new:
        (new / "weights").write_text(text)
        meanwhile()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left(path: Path, word: str, process: int | None = None, host: str = atomic._HERE) -> Path:
    return path.with_name(f".{path.name}.{host}.{os.getpid() if process is None else process}.{word}")


def dead_process() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
def test_a_stop_between_two_moves_loses_nothing(
    error: type[BaseException], at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    write(folder, "old")
    rename, moves = Path.rename, 0

    def stopped(self: Path, target: Path) -> Path:
        nonlocal moves
        moves += 1
        if moves == at:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(error):
        write(folder, "new")
    assert (folder / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("own", [True, False], ids=["of the same number", "of another"])
def test_what_a_process_before_left_is_brought_to_its_end(own: bool, tmp_path: Path) -> None:
    folder, process = tmp_path / "model", os.getpid() if own else dead_process()
    for word in ("old", "new"):
        write(tmp_path / "elsewhere", word)
        (tmp_path / "elsewhere").rename(left(folder, word, process))
    settle(folder, WRITER)
    assert (folder / "weights").read_text() == "new"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("word", ["new", "tmp"])
def test_what_was_not_finished_is_cleared_away(word: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if word == "new":
        left(path, word).mkdir()
        write(path, "now")
    else:
        left(path, word).touch()
        with whole_file(path) as temporary:
            temporary.touch()
    assert names(tmp_path) == ["model"]


def test_what_another_machine_writes_is_left_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    other = left(folder, "new", host="elsewhere")
    other.mkdir()
    write(folder, "now")
    assert names(tmp_path) == [other.name, "model"]
    assert left_elsewhere(folder) == [other]


def test_a_folder_that_may_not_be_listed_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", refused)
    write(tmp_path / "model", "now")
    assert (tmp_path / "model" / "weights").read_text() == "now"
    shutil.rmtree(tmp_path / "model")


# -- what somebody else put there ------------------------------------------------------------------------------


def test_files_that_come_while_a_folder_is_written_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, "old")
    with pytest.raises(ConfigurationError, match=r"model contains thesis\.txt, which saving would overwrite"):
        write(folder, "new", lambda: (folder / "thesis.txt").write_text("important"))
    assert (folder / "thesis.txt").read_text() == "important"
    assert (folder / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("other", ["thesis.txt", "weights.d/thesis.txt", "empty/"])
def test_files_of_somebody_else_are_refused_before_anything_is_written(other: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, "old")
    if other.endswith("/"):
        (folder / other).mkdir()
    else:
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).touch()
    with pytest.raises(ConfigurationError, match=f"model contains {other.split('/')[0]}.*one that save wrote"):
        write(folder, "new")
    assert (folder / other).exists()
    assert (folder / "weights").read_text() == "old"


def test_a_link_that_takes_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder, thesis = tmp_path / "model", tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "weights").write_text("important")
    with pytest.raises(ConfigurationError, match="which saving would overwrite"):
        write(folder, "new", lambda: folder.symlink_to(thesis))
    assert folder.readlink() == thesis
    assert (thesis / "weights").read_text() == "important"


def test_what_comes_into_a_folder_that_was_moved_aside_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    write(folder, "old")
    unlink = Path.unlink

    def late(self: Path, missing_ok: bool = False) -> None:
        if self.name == "weights":
            # By a handle that was opened before.
            (self.parent / "thesis.txt").touch()
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    with pytest.warns(UserWarning, match=r"model\..*\.old remains of a folder that save replaced"):
        write(folder, "new")
    assert (folder / "weights").read_text() == "new"
    assert (left(folder, "old") / "thesis.txt").exists()


def test_a_process_killed_before_it_looked_again_has_replaced_nothing(tmp_path: Path) -> None:
    folder, process = tmp_path / "model", dead_process()
    for word in ("old", "new"):
        write(tmp_path / "elsewhere", word)
        (tmp_path / "elsewhere").rename(left(folder, word, process))
    (left(folder, "old", process) / "thesis.txt").touch()
    settle(folder, WRITER)
    assert names(tmp_path) == ["model"]
    assert names(folder) == ["thesis.txt", "weights"]
    assert (folder / "weights").read_text() == "old"


@pytest.mark.parametrize("which", ["home", "working directory"])
def test_an_empty_folder_that_others_stand_in_is_not_replaced(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "home":
        monkeypatch.setenv("HOME", str(tmp_path))
    else:
        monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    with pytest.raises(ConfigurationError, match=r"cannot be replaced: write a folder inside it"):
        write(tmp_path, "new")
    assert tmp_path.stat().st_ino == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("important")
    with pytest.raises(ConfigurationError, match="model is a file: write a new folder"):
        write(tmp_path / "model", "new")
    assert (tmp_path / "model").read_text() == "important"
