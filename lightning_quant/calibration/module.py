"""A LightningModule whose fit is a calibration in steps, any of which may be the last of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quant.calibration.record import STEPS, Record, StepwiseCalibration
from lightning_quant.calibration.steps import Anchor, step_loader
from lightning_quant.errors import QuantizationError
from lightning_quant.nn.modes import eager_execution
from lightning_quant.nn.structure import is_quantized, mark, quantized_layers, rebuild
from lightning_quant.nn.what_ran import WhatRan
from lightning_quant.utilities.autocast import full_precision

if TYPE_CHECKING:
    from lightning_quant.calibration.state_file import StateFile


class CalibratingModule(pl.LightningModule):
    """A module whose ``fit`` calibrates it, a training step being a step of the calibration.

    Lightning's progress bar, checkpoints and ``ckpt_path=`` work as in a training; a checkpoint holds the calibration
    so far, and the quantized network. Every rank does every step. ``validate``, ``test`` and ``predict`` refuse a
    network that is not calibrated, or only in part. A subclass says what the calibration is, in
    :meth:`start_calibration`; it can be mixed into a module of a task, in front of it.

    Attributes:
        calibration: the one that ``fit`` made; None before.
        calibration_key: under which a checkpoint holds the calibration's state.
        callback_name: of the callback that does the same, which a float module is told to use for a checkpoint.
        own_batches: whether ``validate``, ``test`` and ``predict`` take the batches of the module's own loaders even
            where there is a datamodule, whose hooks do not see them then. ``fit`` never takes a datamodule's.
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
        """Prepare the network, when ``fit`` starts."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its calibration is.")

    def state_file(self, calibration: Any) -> StateFile | None:
        """Where the calibration is written to beside checkpoints; None writes it nowhere."""
        return None

    def after_step(self, calibration: Any) -> None:
        """Log what the step that was done brought."""

    def summarize(self, calibration: Any) -> str:
        """What a finished calibration came to, in a few lines."""
        return f"Calibrated in {calibration.total} steps."

    def check_calibrated(self) -> None:
        """Refuse to evaluate what is not calibrated.

        Raises:
            QuantizationError: in float, or calibrated in part.
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
                f"The calibration stopped after step {done} of {total}, and the network is calibrated in part only: go"
                f" on with {fit}, ckpt_path=...), then test."
            )

    def configure_callbacks(self) -> list[pl.Callback]:
        """What an evaluation ends with."""
        return [WhatRan()]

    # -- fit ----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Put the steps in the place of training batches."""
        super().setup(stage)
        if stage == "fit":
            # A datamodule's training images are for the calibration, which takes what it needs.
            self.trainer.fit_loop._data_source.instance = self
            # How many epochs is known when a checkpoint has said how many there were.
            self.trainer.fit_loop.max_epochs = -1
            # Lightning wonders about modules in evaluation mode; the steps see to it themselves.
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
        """Take out what only ``fit`` needs."""
        super().teardown(stage)
        if hasattr(self, "anchor"):
            del self.anchor

    def on_fit_start(self) -> None:
        """Prepare the network; continue where a checkpoint ended, or a file."""
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
        """The steps that are left."""
        assert self.calibration is not None
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        # One, and another where limits on time or steps have ended one too early.
        loop.max_epochs = max(epochs.processed + (not self.calibration.finished), 1)
        # A loop that was restored counts the batches that were before it.
        before = loop.epoch_loop.batch_progress.current.ready
        # Of what the file has finished one is left that does nothing: without a batch no checkpoint is written.
        left = max(self.calibration.total - self.calibration.done, 1)
        return step_loader(before + left)

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        # A step is no batch that the datamodule's hooks could take.
        if self._trainer is not None and self.trainer.training:
            return args[0]
        return getattr(self, hook_name)(*args) if self.own_batches else super()._call_batch_hook(hook_name, *args)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step of the calibration."""
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
        """Checkpoints are made by the number of optimizer steps."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # It takes no step without a gradient, nor before it has scaled something.
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = scaler.scale(torch.zeros_like(parameter))
        optimizer.step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One that moves nothing of the module."""
        return torch.optim.SGD([torch.zeros(1, dtype=torch.float32, device=self.device, requires_grad=True)], lr=0.0)

    def on_train_end(self) -> None:
        """Say what came out."""
        self.eval()
        if self.calibration is not None and self.calibration.finished:
            rank_zero_info(self.summarize(self.calibration))

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Refuse what is not calibrated; Lightning's sanity check before the calibration is of the float network."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.check_calibrated()

    def on_test_start(self) -> None:
        """Refuse what is not calibrated."""
        self.check_calibrated()

    def on_predict_start(self) -> None:
        """Refuse what is not calibrated."""
        self.check_calibrated()

    def _progress(self) -> tuple[int, int]:
        """Steps done and their total; of a checkpoint without a calibration 0 of 0."""
        if self.calibration is not None:
            return self.calibration.done, self.calibration.total
        done, total = self._resumed[STEPS].tolist() if self._resumed else (0, 0)
        return done, total

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """What a report says of the calibration: of this run, or of the checkpoint's."""
        return self._resumed if self.calibration is None else self.calibration.record()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the calibration so far."""
        state = self._resumed if self.calibration is None else self.calibration.state_dict()
        if state:
            checkpoint[self.calibration_key] = state
        if is_quantized(self):
            mark(checkpoint["state_dict"], self.callback_name)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the quantized structure, and the calibration so far."""
        super().on_load_checkpoint(checkpoint)
        rebuild(self, checkpoint["state_dict"])
        # It only counts, and has nothing to restore.
        checkpoint["optimizer_states"] = []
        self._resumed = checkpoint.get(self.calibration_key, {})
        self.calibration = None


def is_calibrated(module: nn.Module) -> bool:
    """Whether all weight quantizers of a module have ranges.

    Example:
        >>> is_calibrated(nn.Linear(2, 2))
        False
    """
    quantizers = [layer.weight_quantizer for _, layer in quantized_layers(module)]
    return bool(quantizers) and all(quantizer is not None and quantizer.ready for quantizer in quantizers)
