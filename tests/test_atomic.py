"""Files and folders that are whole or not there, whatever happened to the process before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lightning_quant import atomic
from lightning_quant.atomic import left_elsewhere, settle, whole_file, whole_folder


def write(folder: Path, text: str) -> None:
    with whole_folder(folder) as new:
        (new / "weights").write_text(text)


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
    settle(folder)
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
