"""Callback that calibrates a network before its evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.calibration.module import is_calibrated
from lightning_quant.calibration.record import Record, StepwiseCalibration
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import QuantizationError
from lightning_quant.nn.late import builds_late
from lightning_quant.nn.modes import eager_execution
from lightning_quant.nn.structure import is_quantized, mark, quantizers_of, rebuild_when_loading, strip
from lightning_quant.nn.what_ran import WhatRan
from lightning_quant.utilities.progress import ProgressBar

_LOADED = "loaded"


class CalibratingCallback(WhatRan):
    """Calibrates a float network at the start of ``validate``, ``test`` and ``predict``. ``fit`` runs in float.

    A subclass implements the calibration in :meth:`start_calibration`. If a calibration does not complete, for whatever
    reason, the network is restored to float.

    Attributes:
        callback_name: Name of the class, which checkpoints mention to users who load them into a float module.
        calibration: Calibration of this callback; None before, and after one was loaded from a checkpoint.
    """

    callback_name: ClassVar[str]

    calibration: StepwiseCalibration | None

    def __init__(self) -> None:
        self.calibration = None
        # Ranges of the network that the record describes.
        self._recorded_ranges: object = None
        self._restored: Record = {}

    # -- override points ----------------------------------------------------------------------------------------------

    def check(self, pl_module: pl.LightningModule) -> None:
        """Raise an error, before anything is loaded, if the module cannot be calibrated."""

    def compared(self, pl_module: pl.LightningModule) -> Iterable[tuple[str, object, object]]:
        """Compare a module that is calibrated already with this callback.

        Returns:
            Name of an argument, its value in the module, and its value in the callback, of each that quantizers tell.
        """
        return ()

    def start_calibration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Prepare the network, and return its :class:`~lightning_quant.calibration.record.StepwiseCalibration`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement start_calibration.")

    def state_file(self, trainer: pl.Trainer, calibration: Any) -> StateFile | None:
        """Return the file in which the calibration is saved and from which it resumes, or None for no file."""
        return None

    def units(self, calibration: Any) -> int:
        """Return the total of the progress bar: the number of steps, or of their parts if steps report parts."""
        return int(calibration.total - calibration.done)

    def summarize(self, calibration: Any, seconds: float) -> str:
        """Summarize a finished calibration in a few lines."""
        return f"Calibrated in {seconds:.0f} s."

    def calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run all remaining steps, and save each one to the state file."""
        begin = time.perf_counter()
        calibration = self.calibration = self.start_calibration(trainer, pl_module)
        file = self.state_file(trainer, calibration)
        if file is not None:
            file.load(calibration)
            file.check_writable(calibration)
        with ProgressBar(trainer, self.units(calibration), "Calibrating") as bar:
            while not calibration.finished:
                parts: list[str] = []

                def advance(name: str, parts: list[str] = parts) -> None:
                    parts.append(name)
                    bar.update(what=name)

                what = calibration.step(advance)
                if not parts:
                    bar.update(what=what)
                if file is not None:
                    file.save(calibration)
        self._recorded_ranges = _ranges_of(pl_module)
        rank_zero_info(self.summarize(calibration, time.perf_counter() - begin))

    # -- Lightning ----------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """Record of the calibration for the report, from this run or from the checkpoint."""
        return self._restored if self.calibration is None else self.calibration.record()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module before anything is loaded, and let it adopt the structure of a quantized checkpoint.

        A network that the module builds later, in its own ``setup`` or ``configure_model``, is checked once it exists.
        """
        if stage == "fit":
            if is_quantized(pl_module):
                rank_zero_info(f"{self.callback_name}: back to float for fit; the next evaluation calibrates again.")
                strip(pl_module)
            self._forget()
            return
        with suppress(QuantizationError) if builds_late(pl_module) else nullcontext():
            self.check(pl_module)
        rebuild_when_loading(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate before ``trainer.validate``. Validation during fit evaluates the float network."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._ensure(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate before ``trainer.test``."""
        self._ensure(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate before ``trainer.predict``."""
        self._ensure(trainer, pl_module)

    def _ensure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_calibrated(pl_module):
            if self._recorded_ranges not in (_LOADED, ranges := _ranges_of(pl_module)):
                # The record is of another network, or of a time before a checkpoint without callbacks was loaded.
                self._forget()
            self._recorded_ranges = ranges
            self._check_agrees(pl_module)
            rank_zero_info(f"{self.callback_name}: already calibrated; lightning_quant.strip(module) resets it.")
            return
        self._forget()
        self.check(pl_module)
        # Tensors created in the Trainer's inference mode could not be used outside it.
        with torch.inference_mode(False), eager_execution():
            try:
                self.calibrate(trainer, pl_module)
            except BaseException:
                # Including Ctrl-C in a notebook: a partial calibration would be mistaken for a complete one.
                self._forget()
                strip(pl_module)
                raise

    def _check_agrees(self, pl_module: pl.LightningModule) -> None:
        for name, found, expected in self.compared(pl_module):
            if found != expected:
                raise QuantizationError(
                    f"The module is already quantized, with {name}={found!r}, and the callback says"
                    f" {name}={expected!r}: call lightning_quant.strip(module) first, which lets it calibrate anew, or"
                    " give the callback the arguments it was calibrated with."
                )

    def _forget(self) -> None:
        self.calibration, self._recorded_ranges, self._restored = None, None, {}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add instructions to a quantized checkpoint for users who load it into a float module."""
        if is_quantized(pl_module):
            mark(checkpoint["state_dict"], self.callback_name)
        else:
            # A network that is back in float has no calibration.
            checkpoint.get("callbacks", {}).pop(self.state_key, None)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Discard the calibration of another network."""
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the record of the calibration."""
        return dict(self.record)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the record of a calibration from another run."""
        self._restored, self._recorded_ranges = state_dict, _LOADED


def _ranges_of(pl_module: pl.LightningModule) -> object:
    """Compute the sum of each quantizer buffer, which distinguishes calibrated networks."""
    return [
        (name, float(value.detach().double().nan_to_num(0.0).sum()))
        for name, quantizer in quantizers_of(pl_module)
        for value in quantizer.buffers()
    ]
