"""Callback that evaluates the float weights of a checkpoint, even a quantized one."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_quant.nn.structure import rebuild_when_loading, strip


class InFloat(pl.Callback):
    """Callback behind ``--quantization null``: it removes a module's quantizers before the evaluation."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the module load a quantized checkpoint; a fit is left alone."""
        if stage != "fit":
            rebuild_when_loading(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate in float; a validation within a fit evaluates the module as it is trained."""
        if trainer.state.fn == "validate":
            strip(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test in float."""
        strip(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predict in float."""
        strip(pl_module)
