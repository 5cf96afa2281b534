"""What the runs of all methods in the demo have in common."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl

TEST_IMAGES = 360

cpu_trainer = partial(
    pl.Trainer,
    accelerator="cpu",
    devices=1,
    limit_val_batches=0,
    enable_checkpointing=False,
    enable_model_summary=False,
)
