"""A callback that calibrates what is about to be evaluated."""

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
    """Calibrates what ``validate``, ``test`` and ``predict`` find in float; ``fit`` is in float.

    A subclass says how, in :meth:`start_calibration`. What is calibrated in part only, for whatever reason, is put back
    to float.

    Attributes:
        callback_name: of the class, which a float module is told to use for a checkpoint.
        calibration: the one that this callback made; None before, and where a checkpoint brought another.
    """

    callback_name: ClassVar[str]

    calibration: StepwiseCalibration | None

    def __init__(self) -> None:
        self.calibration = None
        # What the record is of.
        self._of: object = None
        self._restored: Record = {}

    # -- override points ----------------------------------------------------------------------------------------------

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse, before anything is loaded, what cannot be calibrated."""

    def compared(self, pl_module: pl.LightningModule) -> Iterable[tuple[str, object, object]]:
        """Compare a module that is calibrated already with this callback.

        Returns:
            Name of an argument, its value in the module, and its value in the callback, of each that quantizers tell.
        """
        return ()

    def start_calibration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Prepare the network, and return its :class:`~lightning_quant.calibration.record.StepwiseCalibration`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its calibration is.")

    def state_file(self, trainer: pl.Trainer, calibration: Any) -> StateFile | None:
        """Where the calibration is written to, and taken from; None writes it nowhere."""
        return None

    def units(self, calibration: Any) -> int:
        """What a progress bar counts: steps; where one tells ``advance`` of its parts, these in its place."""
        return int(calibration.total - calibration.done)

    def summarize(self, calibration: Any, seconds: float) -> str:
        """What a finished calibration came to, in a few lines."""
        return f"Calibrated in {seconds:.0f} s."

    def calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All steps that are left, each of which is in the file when it is done."""
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
        self._of = _ranges_of(pl_module)
        rank_zero_info(self.summarize(calibration, time.perf_counter() - begin))

    # -- Lightning ----------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """What a report says of the calibration: of this run, or of the checkpoint's."""
        return self._restored if self.calibration is None else self.calibration.record()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check before anything is loaded, and let the module take the structure of a quantized checkpoint.

        A network that the module builds later, in its own ``setup`` or ``configure_model``, is checked when it is
        there.
        """
        if stage == "fit":
            if is_quantized(pl_module):
                rank_zero_info(f"{self.callback_name}: back to float for fit; the next evaluation calibrates anew.")
                strip(pl_module)
            self._forget()
            return
        with suppress(QuantizationError) if builds_late(pl_module) else nullcontext():
            self.check(pl_module)
        rebuild_when_loading(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate before ``trainer.validate``; validation within fit is of the float network."""
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
            if self._of not in (_LOADED, found := _ranges_of(pl_module)):
                # Of another network, or before a checkpoint that was saved without callbacks.
                self._forget()
            self._of = found
            self._check_agrees(pl_module)
            rank_zero_info(
                f"{self.callback_name}: calibrated already; lightning_quant.strip(module) lets it begin anew."
            )
            return
        self._forget()
        self.check(pl_module)
        # What is made in the Trainer's inference mode could be used nowhere else.
        with torch.inference_mode(False), eager_execution():
            try:
                self.calibrate(trainer, pl_module)
            except BaseException:
                # Also Ctrl-C in a notebook: what is calibrated in part would be taken for calibrated.
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
        self.calibration, self._of, self._restored = None, None, {}

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say in a quantized checkpoint what to do where it does not fit."""
        if is_quantized(pl_module):
            mark(checkpoint["state_dict"], self.callback_name)
        else:
            # A network in float again has no calibration.
            checkpoint.get("callbacks", {}).pop(self.state_key, None)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Forget the calibration of another network."""
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The record of the calibration."""
        return dict(self.record)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the record of a calibration that another run has seen."""
        self._restored, self._of = state_dict, _LOADED


def _ranges_of(pl_module: pl.LightningModule) -> object:
    """What tells calibrated networks apart: a sum of each tensor of their quantizers."""
    return [
        (name, float(value.detach().double().nan_to_num(0.0).sum()))
        for name, quantizer in quantizers_of(pl_module)
        for value in quantizer.buffers()
    ]
