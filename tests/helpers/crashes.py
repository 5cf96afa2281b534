"""Processes that are killed at a chosen moment."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

TICK = "tests.tick"
_MOVES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def tick() -> None:
    """A moment of its own, of a job that is killed."""
    sys.audit(TICK)


def runs(job: Callable[[], object]) -> None:
    """Do a job in a forked process, to its end."""
    assert not killed(job, at=0, folder=Path("/nowhere"))


def moments(job: Callable[[], object], folder: Path, stride: int = 1) -> Iterator[int]:
    """Kill a job at one moment after the other, until it ends before; yields after each kill."""
    at = 1
    while killed(job, at, folder):
        yield at
        at += stride


def killed(job: Callable[[], object], at: int, folder: Path) -> bool:
    """Run a job in a forked process that gets SIGKILL at a moment; False where it ended before that.

    Moments are each :func:`tick`, each file that is opened to write and each that is moved or removed in a folder, and
    each file of safetensors twice: before it is written, and when half of it is.
    """
    process = mp.get_context("fork").Process(target=_run, args=(job, at, str(folder)))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the job ended with {process.exitcode}, see above"
    return process.exitcode != 0


def _run(job: Callable[[], object], at: int, folder: str) -> None:
    torch.set_num_threads(1)
    left = at

    def moment() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if (event == TICK or _writes(event, arguments, folder)) and moment():
            die()

    files: Any = safetensors.torch
    written = files.serialize_file

    def write(tensors: Any, path: Any, **rest: Any) -> None:
        if moment():
            die()
        written(tensors, path, **rest)
        if moment():
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    if at:
        sys.addaudithook(heard)
        files.serialize_file = write
    try:
        job()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _writes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, mode, flags = arguments
        written = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & os.O_CREAT)
        return written and str(path).startswith(folder)
    return event in _MOVES and any(str(argument).startswith(folder) for argument in arguments)
