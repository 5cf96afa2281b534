"""Checks of the checkpoint names `best`, `last` and `hpc`, for a process that did not train."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_quant.cli.advice import UsageError
from lightning_quant.utilities.paths import check_writable, trainer_path

NAMED = ("best", "last", "hpc")
# Verbs that start from scratch if there is no last checkpoint yet.
_TRAINS = ("fit", "calibrate")


def check_named(verb: str, name: str | None, trainer: Trainer) -> None:
    """Refuse a name for which Lightning would not find a checkpoint, and list the existing checkpoints.

    Args:
        verb: Verb of the command line.
        name: Value of `--ckpt_path`; paths are accepted unchecked.
        trainer: Trainer with the checkpoint callbacks of the command line.

    Raises:
        UsageError: The name `best`, which only the training process can resolve, or `last` or `hpc` without such a
            checkpoint.
    """
    if name not in NAMED or "://" in str(trainer.default_root_dir):
        return
    current, folder = _folders(trainer)
    files = sorted(folder.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
    if name == "last" and (verb in _TRAINS or any(current.glob(f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}*.ckpt"))):
        return
    if name == "hpc" and any(trainer_path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")):
        return
    why = "only the process that trained knows which it is" if name == "best" else f"there is none in {current}"
    write = (_recorded_best(files[0]) if name == "best" else None) or files[0] if files else "FILE"
    raise UsageError(
        f"--ckpt_path {name}: {why}; the folder {folder} holds {listed(files, folder)}. Write --ckpt_path {write}"
    )


def check_root(trainer: Trainer) -> None:
    """Refuse a log folder that is not writable, before the config of the run is saved there.

    Args:
        trainer: Trainer of the command line.

    Raises:
        ConfigurationError: Folder that is not writable.
    """
    root = str(trainer.log_dir or trainer.default_root_dir)
    if trainer.is_global_zero and not trainer.fast_dev_run and "://" not in root:  # type: ignore[attr-defined]
        check_writable(trainer_path(root))


def listed(paths: Iterable[Path], folder: Path | None = None) -> str:
    """Return the first ten paths as text.

    Example:
        >>> listed([Path("a.ckpt"), Path("b.ckpt")]), listed([])
        ('a.ckpt, b.ckpt', 'nothing')
    """
    names = [str(path.relative_to(folder)) for path in paths] if folder else sorted(path.name for path in paths)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"


def _folders(trainer: Trainer) -> tuple[Path, Path]:
    """Return the folder of this run's checkpoints, and the one that also holds those of earlier runs."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            return trainer_path(callback.dirpath), trainer_path(callback.dirpath)
    root = trainer_path(trainer.log_dir or trainer.default_root_dir)
    # With a logger, each run has its own folder beside those of other runs.
    return root / "checkpoints", root.parent if trainer.loggers else root / "checkpoints"


def _recorded_best(file: Path) -> str | None:
    """Return the best checkpoint according to the newest one."""
    with suppress(Exception):
        states = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["callbacks"].values()
        paths = [state["best_model_path"] for state in states if isinstance(state, dict) and "best_model_path" in state]
        return next(str(path) for path in paths if path and trainer_path(path).is_file())
    return None
