"""LightningModule whose fit is a stepwise calibration that can be stopped and resumed after any step."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quant.calibration.record import STEPS, Record, StepwiseCalibration
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.calibration.steps import Anchor, step_loader
from lightning_quant.errors import QuantizationError
from lightning_quant.nn.modes import eager_execution
from lightning_quant.nn.structure import is_quantized, mark, quantized_layers, rebuild
from lightning_quant.nn.what_ran import WhatRan
from lightning_quant.utilities.autocast import full_precision


class CalibratingModule(pl.LightningModule):
    """LightningModule whose ``fit`` calibrates it: each training step is a calibration step.

    Lightning's progress bar, checkpoints and ``ckpt_path=`` work as in training. A checkpoint holds the calibration so
    far and the quantized network. Every rank runs every step. ``validate``, ``test`` and ``predict`` raise an error if
    the network is not calibrated completely. A subclass implements the calibration in :meth:`start_calibration`; it can
    be combined with a task's module, as its first base class.

    Attributes:
        calibration: Calibration that ``fit`` created; None before.
        calibration_key: Key of the calibration's state in a checkpoint.
        callback_name: Name of the corresponding callback, which checkpoints mention to users who load them into a float
            module.
        own_batches: Whether ``validate``, ``test`` and ``predict`` use the module's own loaders even if there is a
            datamodule, whose hooks are then not applied. ``fit`` never uses batches of a datamodule.
    """

    fit_is_calibration = True
    calibration_key: ClassVar[str]
    callback_name: ClassVar[str]
    own_batches: ClassVar[bool] = False

    calibration: StepwiseCalibration | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.calibration = None
        self._file: StateFile | None = None
        self._resumed: dict[str, Tensor] = {}

    # -- override points ----------------------------------------------------------------------------------------------

    def start_calibration(self) -> StepwiseCalibration:
        """Prepare the network when ``fit`` starts, and return its calibration."""
        raise NotImplementedError(f"{type(self).__name__} does not implement start_calibration.")

    def state_file(self, calibration: Any) -> StateFile | None:
        """Return the file in which the calibration is saved in addition to checkpoints, or None for no file."""
        return None

    def after_step(self, calibration: Any) -> None:
        """Log the result of the last step."""

    def summarize(self, calibration: Any) -> str:
        """Summarize a finished calibration in a few lines."""
        return f"Calibrated in {calibration.total} steps."

    def check_calibrated(self) -> None:
        """Raise an error if the network is not calibrated.

        Raises:
            QuantizationError: The network is in float, or its calibration is incomplete.
        """
        fit = "trainer.fit(module" if self.own_batches else "trainer.fit(module, datamodule"
        if not is_calibrated(self):
            raise QuantizationError(
                f"The network is not calibrated: call {fit}) first, or pass ckpt_path= with a checkpoint of a"
                " calibration (lightning-quant calibrate, then test --ckpt_path FILE)."
            )
        done, total = self._progress()
        if done < total:
            raise QuantizationError(
                f"The calibration stopped after step {done} of {total}, so the network is only partly calibrated:"
                f" continue with {fit}, ckpt_path=...), then test."
            )

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that reports what was evaluated."""
        return [WhatRan()]

    # -- fit ----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Replace the training batches by the steps of the calibration."""
        super().setup(stage)
        if stage == "fit":
            # The calibration draws its images from the datamodule itself.
            self.trainer.fit_loop._data_source.instance = self
            # The number of epochs is set once a checkpoint has restored how many have passed.
            self.trainer.fit_loop.max_epochs = -1
            # Lightning warns about modules in evaluation mode. The steps set the mode that they need.
            self.train()
            if not any(parameter.requires_grad for parameter in self.parameters()):
                self.anchor = Anchor()
        if self.own_batches:
            self._take_own_batches()

    def _take_own_batches(self) -> None:
        trainer = self.trainer
        evaluations = trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop
        for loop in (*evaluations, trainer.predict_loop):
            if isinstance(loop._data_source.instance, pl.LightningDataModule):
                loop._data_source.instance = self

    def teardown(self, stage: str) -> None:
        """Remove the anchor that only ``fit`` needs."""
        super().teardown(stage)
        if hasattr(self, "anchor"):
            del self.anchor

    def on_fit_start(self) -> None:
        """Prepare the network, and resume from a checkpoint or a state file."""
        with eager_execution():
            self.calibration = self.start_calibration()
        self._file = self.state_file(self.calibration)
        if self._resumed:
            self.calibration.load_state_dict({key: value.to(self.device) for key, value in self._resumed.items()})
        elif self._file is not None:
            self._file.load(self.calibration)
        if self._file is not None:
            self._file.check_writable(self.calibration)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of the remaining steps."""
        assert self.calibration is not None
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        # One epoch, and another one if a limit on time or steps ended the last one early.
        loop.max_epochs = max(epochs.processed + (not self.calibration.finished), 1)
        # A restored loop also counts the earlier batches.
        earlier = loop.epoch_loop.batch_progress.current.ready
        # A finished calibration gets one step that does nothing, since without a batch no checkpoint is written.
        remaining = max(self.calibration.total - self.calibration.done, 1)
        return step_loader(earlier + remaining)

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        # A step is not a batch for the datamodule's hooks.
        if self._trainer is not None and self.trainer.training:
            return args[0]
        return getattr(self, hook_name)(*args) if self.own_batches else super()._call_batch_hook(hook_name, *args)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run one step of the calibration."""
        assert self.calibration is not None
        if not self.calibration.finished:
            with full_precision(self.device), eager_execution():
                self.calibration.step()
            if self._file is not None:
                self._file.save(self.calibration)
            self.after_step(self.calibration)
        if self.calibration.finished and not self.trainer.is_last_batch:
            self.trainer.should_stop = True
        self._count()

    def _count(self) -> None:
        """Take an optimizer step, since Lightning schedules checkpoints by their number."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # The scaler takes no step without a gradient, nor before it has scaled something.
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = scaler.scale(torch.zeros_like(parameter))
        optimizer.step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return an optimizer that changes nothing in the module."""
        return torch.optim.SGD([torch.zeros(1, dtype=torch.float32, device=self.device, requires_grad=True)], lr=0.0)

    def on_train_end(self) -> None:
        """Report the result."""
        self.eval()
        if self.calibration is not None and self.calibration.finished:
            rank_zero_info(self.summarize(self.calibration))

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Raise an error if not calibrated. Lightning's sanity check before fit evaluates the float network."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.check_calibrated()

    def on_test_start(self) -> None:
        """Raise an error if not calibrated."""
        self.check_calibrated()

    def on_predict_start(self) -> None:
        """Raise an error if not calibrated."""
        self.check_calibrated()

    def _progress(self) -> tuple[int, int]:
        """Return the number of completed steps and their total: (0, 0) after a checkpoint without a calibration."""
        if self.calibration is not None:
            return self.calibration.done, self.calibration.total
        done, total = self._resumed[STEPS].tolist() if self._resumed else (0, 0)
        return done, total

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """Record of the calibration for the report, from this run or from the checkpoint."""
        return self._resumed if self.calibration is None else self.calibration.record()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the calibration so far."""
        state = self._resumed if self.calibration is None else self.calibration.state_dict()
        if state:
            checkpoint[self.calibration_key] = state
        if is_quantized(self):
            mark(checkpoint["state_dict"], self.callback_name)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the quantized structure and the calibration so far."""
        super().on_load_checkpoint(checkpoint)
        rebuild(self, checkpoint["state_dict"])
        # The optimizer only counts steps and has no state to restore.
        checkpoint["optimizer_states"] = []
        self._resumed = checkpoint.get(self.calibration_key, {})
        self.calibration = None


def is_calibrated(module: nn.Module) -> bool:
    """Return whether all weight quantizers of a module have ranges.

    Example:
        >>> is_calibrated(nn.Linear(2, 2))
        False
    """
    quantizers = [layer.weight_quantizer for _, layer in quantized_layers(module)]
    return bool(quantizers) and all(quantizer is not None and quantizer.ready for quantizer in quantizers)
