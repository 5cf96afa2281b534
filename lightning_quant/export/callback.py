"""Callback that saves the quantized module at the end of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.export.artifact import save_quantized
from lightning_quant.export.folder import WRITER
from lightning_quant.nn.structure import is_quantized
from lightning_quant.utilities.files import check_replaceable
from lightning_quant.utilities.paths import check_on_first_rank, user_path


class SaveQuantized(pl.Callback):
    """Callback that saves the quantized module when ``fit`` or ``test`` ends.

    Load the folder with :func:`lightning_quant.load_quantized`.

    Args:
        folder: Folder to write; an earlier one of the same kind is replaced.

    Example:
        >>> from lightning_quant import IGQViT
        >>> trainer = pl.Trainer(callbacks=[IGQViT(4, 4), SaveQuantized("vit_4bit")], logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder with other files, or one that is not writable, before the run starts."""
        if stage in ("fit", "test"):
            check_on_first_rank(trainer, partial(check_replaceable, self.folder, WRITER))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the calibrated or trained module."""
        self._save(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the tested module."""
        self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_quantized(pl_module):
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"fast_dev_run: the quantized module is not saved, {self.folder} is not replaced.")
            return
        folder = save_quantized(pl_module, self.folder)
        rank_zero_info(f"The quantized module is in {folder}; lightning_quant.load_quantized reads it.")
