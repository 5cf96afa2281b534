"""Conversion of a user's paths to absolute local paths, the only ones that the rest of the package handles."""

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
    """Return the absolute path, with ``~``, ``~name`` and variables expanded and links resolved.

    Write ``./~`` for a folder that is really named ``~``.

    Args:
        path: Path from the user. Undefined environment variables are left unchanged.

    Raises:
        ConfigurationError: The path is empty, has an unknown user, or is a URL such as ``s3://``.

    Example:
        >>> user_path("~/states") == Path.home().resolve() / "states"
        True
        >>> user_path("states") == user_path("./states/") == Path.cwd() / "states"
        True
    """
    text = os.fspath(path)
    if not text:
        raise ConfigurationError("Expected a path, but found an empty string: write '.' for the working directory.")
    if "://" in text:
        raise ConfigurationError(
            f"{text!r} is a URL, but expected a path on this machine: write a local path, and copy from or to it."
        )
    try:
        whole = os.path.expandvars(text)
        # Path reduces "./~" to "~".
        return (Path(whole).expanduser() if whole.startswith("~") else Path(whole)).resolve()
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigurationError(f"{text!r} cannot be resolved ({error}): write the absolute path.") from error


def trainer_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder of the Trainer or its logger, without expanding ``~``.

    Raises:
        ConfigurationError: The path is a URL such as ``s3://``.

    Example:
        >>> trainer_path("lightning_logs") == Path.cwd() / "lightning_logs"
        True
    """
    if "://" in (text := os.fspath(path)):
        raise ConfigurationError(
            f"The Trainer writes to {text}, which is a URL, but these files need a local disk: write a local folder."
        )
    return Path(text).absolute()


def local_path(name: str | os.PathLike[str]) -> str:
    """Return :func:`user_path` if the file or folder exists, otherwise the string, which may be a name or a URL.

    Example:
        >>> local_path("google/ddpm-cifar10-32")
        'google/ddpm-cifar10-32'
    """
    with suppress(ConfigurationError):
        if (path := user_path(name)).exists():
            return str(path)
    return os.fspath(name)


def check_on_first_rank(trainer: pl.Trainer, check: Callable[[], None]) -> None:
    """Run a check on the first rank, the only one that writes, and raise its error on all ranks.

    Args:
        trainer: Trainer. All of its ranks must call this function.
        check: Function that raises an error, such as :func:`check_writable` of a folder.

    Raises:
        ConfigurationError: The check failed.

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
    """Raise an error if a folder cannot be created or written to. The check leaves nothing behind.

    Args:
        folder: Path as :func:`user_path` returns it.

    Raises:
        ConfigurationError: The path is a file, is not writable, or the disk is full or read-only.

    Example:
        >>> check_writable(user_path("reports/of/today"))
    """
    remedy = "write a folder that can be created and written to."
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise ConfigurationError(f"{existing} is a file, so {folder} cannot be a folder: {remedy}")
        with TemporaryFile(dir=existing, prefix=".writable-") as probe:
            probe.write(b"\0")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}") from error
