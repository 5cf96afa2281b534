"""Trainers for the projects of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from helpers.networks import QUIET


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> Any:
    """On the CPU, quiet, with what a foreign module may log to."""
    return pl.Trainer(callbacks=list(callbacks), **{**QUIET, "default_root_dir": folder, "max_epochs": 1, **options})
