"""Callback that writes the report of a run when it ends."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_quant.analysis import Analysis, Recorder, analyze_network, quantized_root, trained_quantized
from lightning_quant.calibration.callback import CalibratingCallback
from lightning_quant.calibration.module import CalibratingModule
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.nn.agreement import divided_parameter
from lightning_quant.nn.modes import eager_execution
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.report.comparing import float_network, read_float_state
from lightning_quant.report.content import Run, logged_metrics, with_full_names
from lightning_quant.report.html import RunReport, report_folder, write_report
from lightning_quant.report.methods import section_of
from lightning_quant.utilities.paths import check_on_first_rank, check_writable, user_path
from lightning_quant.utilities.progress import ProgressBar


class QuantizationReport(pl.Callback):
    """Callback that writes ``quantization_report.html`` and its JSON twin after a fit, validation, test or prediction.

    The same figures go to the Trainer's loggers, as ``quantization/...``. During the run, some calls of the network are
    recorded. At its end they are repeated quantized, in float, and with each layer alone, which takes two passes over
    them per layer. The page opens from disk and loads nothing else.

    Args:
        folder: Folder of the report. None takes the logger's folder, or the Trainer's ``default_root_dir`` without a
            logger.
        sensitivity: Whether to measure the layers one by one.
        images: Minimum number of batch rows to record.
        float_metrics: Metrics of the float network, keyed by the names that the module logs, to show beside the
            quantized ones.
        float_ckpt_path: Checkpoint of the float network to compare the outputs with. None takes the quantized network's
            weights without quantizers, except for a network that was trained quantized, whose outputs are then not
            compared.

    Raises:
        ConfigurationError: Fewer than one image.

    Example:
        >>> from lightning_quant import GradientQuantization
        >>> trainer = pl.Trainer(callbacks=[GradientQuantization(), QuantizationReport("report")], logger=False)
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        sensitivity: bool = True,
        images: int = 32,
        float_metrics: Mapping[str, float] | None = None,
        float_ckpt_path: str | None = None,
    ) -> None:
        if images < 1:
            raise ConfigurationError(f"images={images}: expected at least one.")
        self.folder = None if folder is None else user_path(folder)
        self.sensitivity, self.images = sensitivity, images
        self.float_metrics = dict(float_metrics or {})
        self.float_ckpt_path = float_ckpt_path
        # Whether quantizers were added only to measure the network, so that its weights are those of a float network.
        self.starts_in_float = False
        self.report: RunReport | None = None
        self.written: list[Path] = []
        self._recorder: Recorder | None = None
        self._root = ""
        self._start = 0.0

    @property
    def analysis(self) -> Analysis | None:
        """Analysis of the last report."""
        return None if self.report is None else self.report.analysis

    # -- while it runs ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the folder is writable and the float checkpoint readable, and start timing."""
        if self.float_ckpt_path is not None:
            read_float_state(self.float_ckpt_path)
        self._forget()
        check_on_first_rank(trainer, partial(check_writable, report_folder(trainer, self.folder)))
        self._start = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the training of a quantized module. Calibrating modules are recorded at the end of ``fit``."""
        if not isinstance(pl_module, CalibratingModule):
            self._start_recording(pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Record the validation. Within ``fit`` its batches count as training batches."""
        self._start_recording(pl_module)

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Start recording, after all callbacks have calibrated."""
        self._start_recording(pl_module)

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Start recording, after all callbacks have calibrated."""
        self._start_recording(pl_module)

    def _start_recording(self, pl_module: pl.LightningModule) -> None:
        if self._recorder is None and next(quantizers_of(pl_module), None) is not None:
            self._root = quantized_root(pl_module)
            self._recorder = Recorder(pl_module.get_submodule(self._root), self.images)

    # -- at its end ---------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of a training or a calibration."""
        if isinstance(pl_module, CalibratingModule) and pl_module.calibration is not None:
            self._start_recording(pl_module)
            with torch.no_grad():
                pl_module.calibration.replay()
        self._write(trainer, pl_module, "fit")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of ``trainer.validate``; validation within ``fit`` has none."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "validation")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of a test."""
        self._write(trainer, pl_module, "test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of a prediction."""
        self._write(trainer, pl_module, "prediction")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop recording."""
        self._forget()

    def _forget(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder = None

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        seconds = time.perf_counter() - self._start
        # On all ranks, since the logger's folder is broadcast.
        folder = report_folder(trainer, self.folder)
        recorder = self._recorder
        self._forget()
        if not trainer.is_global_zero:
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it elsewhere
        if recorder is None and stage == "fit" and any(isinstance(cb, CalibratingCallback) for cb in callbacks):
            # The network is in float until it is evaluated.
            return
        if recorder is None:
            rank_zero_warn(
                f"No report: no quantizer in {type(pl_module).__name__} has a range. Add GradientQuantization, IGQViT"
                " or AccuQuant to the callbacks, or load a quantized checkpoint."
            )
            return
        network = pl_module.get_submodule(self._root)
        # A single rank would wait for the shards of the others.
        if divided_parameter(network):
            rank_zero_warn(
                "No report: the weights are sharded over ranks. Save a full checkpoint, and analyze it on one device:"
                " lightning_quant.analyze(module, datamodule, ckpt_path=...)."
            )
            return
        section = section_of(trainer, pl_module)
        # A compiled network would be recompiled for each layer that is put in float.
        with eager_execution(), tempfile.TemporaryDirectory() as drawn:
            try:
                analysis = self._analyzed(trainer, pl_module, network, recorder)
            except QuantizationError as error:
                rank_zero_warn(f"No report: {error}")
                return
            # Names as ``exclude`` takes them.
            if not section.names_are_of_the_denoiser:
                analysis = with_full_names(self._root, analysis)
            run = Run(
                trainer,
                pl_module,
                section,
                recorder,
                self._root,
                analysis,
                stage,
                seconds,
                self.float_metrics,
                self.float_ckpt_path,
            )
            self.report = run.report(user_path(drawn))
        self.written = write_report(folder, self.report)
        rank_zero_info(f"Report: {self.written[0]}")
        metrics = logged_metrics(analysis)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _analyzed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, recorder: Recorder
    ) -> Analysis:
        path = self.float_ckpt_path
        options: dict[str, Any] = {
            "trained": trained_quantized(network) and not self.starts_in_float,
            "float_network": None if path is None else partial(float_network, pl_module, network, path),
        }
        if not self.sensitivity:
            return analyze_network(network, recorder.calls, sensitivity=False, **options)
        owners = {name.rpartition(".")[0] for name, _ in quantizers_of(network)}
        with ProgressBar(trainer, len(owners), "Measuring layers") as bar:
            return analyze_network(network, recorder.calls, advance=lambda name: bar.update(what=name), **options)
