"""The one door by which a user's paths come in: what is below it sees whole paths of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from lightning_quant.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path that a user means, ``~``, ``~name`` and variables expanded, links followed.

    A folder that is really called ``~`` is written ``./~``.

    Args:
        path: Path as it was given. Variables of the environment that are not set stay as they are.

    Raises:
        ConfigurationError: An empty text, an unknown user, or an address such as ``s3://``.

    Example:
        >>> user_path("~/states") == Path.home().resolve() / "states"
        True
        >>> user_path("states") == user_path("./states/") == Path.cwd() / "states"
        True
    """
    given = os.fspath(path)
    if not given:
        raise ConfigurationError("Expected a path, found an empty text: write '.' for the working directory.")
    if "://" in given:
        raise ConfigurationError(
            f"{given!r} is an address, expected a path on this machine: write a local one, and copy from or to it."
        )
    try:
        whole = os.path.expandvars(given)
        # Of "./~" a Path keeps "~" alone.
        return (Path(whole).expanduser() if whole.startswith("~") else Path(whole)).resolve()
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigurationError(f"{given!r} cannot be resolved ({error}): write the whole path.") from error


def trainer_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder of the Trainer's or of its logger's, whose ``~`` they have expanded, or not.

    Raises:
        ConfigurationError: An address such as ``s3://``.

    Example:
        >>> trainer_path("lightning_logs") == Path.cwd() / "lightning_logs"
        True
    """
    if "://" in (given := os.fspath(path)):
        raise ConfigurationError(
            f"The Trainer's files go to {given}, which is an address, and these to a disk: give a local folder."
        )
    return Path(given).absolute()


def local_path(name: str | os.PathLike[str]) -> str:
    """Return :func:`user_path` where a file or folder is there; else the text, which may be a name or an address.

    Example:
        >>> local_path("google/ddpm-cifar10-32")
        'google/ddpm-cifar10-32'
    """
    with suppress(ConfigurationError):
        if (found := user_path(name)).exists():
            return str(found)
    return os.fspath(name)


def check_on_first_rank(trainer: pl.Trainer, check: Callable[[], None]) -> None:
    """Let all ranks refuse what the first one, which alone writes, cannot write to.

    Args:
        trainer: Trainer whose ranks all call this.
        check: Function that raises, such as :func:`check_writable` of a folder.

    Raises:
        ConfigurationError: The check's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> check_on_first_rank(Trainer(logger=False, accelerator="cpu"), lambda: check_writable(user_path("reports")))
    """
    refusal = ""
    if trainer.is_global_zero:
        try:
            check()
        except ConfigurationError as error:
            refusal = str(error)
    if refusal := str(trainer.strategy.broadcast(refusal)):
        raise ConfigurationError(refusal)


def check_writable(folder: Path) -> None:
    """Raise where a folder cannot be made or written to; nothing is left of the trial.

    Args:
        folder: Path as :func:`user_path` returns it.

    Raises:
        ConfigurationError: A file in its place, no right to write there, no space, a disk that is read-only.

    Example:
        >>> check_writable(user_path("reports/of/today"))
    """
    remedy = "give a folder that can be made and written to."
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir():
            raise ConfigurationError(f"{there} is a file, and {folder} cannot be a folder: {remedy}")
        with TemporaryFile(dir=there, prefix=".writable-") as probe:
            probe.write(b"\0")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}") from error
