"""The state of a calibration on disk, so that a stopped one goes on and a finished one is not repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_quant.calibration.record import StepwiseCalibration
from lightning_quant.errors import CheckpointError
from lightning_quant.utilities.files import whole_file
from lightning_quant.utilities.paths import check_on_first_rank, check_writable, trainer_path


def cache_folder(trainer: pl.Trainer, folder: Path | None, name: str) -> Path:
    """The folder that was given for what a calibration keeps, or ``name`` in the Trainer's ``default_root_dir``."""
    return folder or trainer_path(trainer.default_root_dir) / name


class StateFile:
    """One file for each combination of what a calibration depends on, the Trainer's precision included.

    Args:
        trainer: says which rank writes and where.
        folder: None is ``name`` in ``default_root_dir``.
        name: of the method.
        parts: what the calibration depends on beside the precision, such as the fingerprint of its settings and
            :func:`~lightning_quant.nn.structure.weights_hash`; the file's name is made of their ``repr``.
        active: False neither reads nor writes, where a state is not enough to go on from.

    Example:
        >>> trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> first, second = (StateFile(trainer, None, "igq_vit", "settings", weights).path for weights in ("a", "b"))
        >>> first.parent.name, first.suffix, first == second
        ('igq_vit', '.safetensors', False)
    """

    def __init__(
        self, trainer: pl.Trainer, folder: Path | None, name: str, *parts: object, active: bool = True
    ) -> None:
        self.trainer, self.active = trainer, active
        home = cache_folder(trainer, folder, name)
        key = repr((*parts, str(trainer.precision)))
        self.path = home / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors"

    def load(self, calibration: StepwiseCalibration) -> None:
        """Let a calibration take over what an earlier process computed; all ranks take it from the first.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self.active:
            return
        state = self._read()
        if state is None:
            return
        device = self.trainer.strategy.root_device
        calibration.load_state_dict({key: value.to(device) for key, value in state.items()})
        what = "taken" if calibration.finished else f"goes on at step {calibration.done + 1}"
        rank_zero_info(f"Calibration of the same weights, data and settings {what} from {self.path}.")

    def _read(self) -> dict[str, Tensor] | None:
        """The state that the first rank finds; other ranks need not see its disk."""
        state: dict[str, Any] = {}
        names: list[str] | None = None
        damage = ""
        if self.trainer.is_global_zero and self.path.is_file():
            try:
                state = load_file(self.path)
                names = list(state)
            except SafetensorError as error:
                damage = str(error)
        broadcast: Callable[[Any], Any] = self.trainer.strategy.broadcast
        names, damage = broadcast((names, damage))
        if damage:
            raise CheckpointError(f"{self.path} is damaged ({damage}): delete it, and calibrate anew.")
        # One after the other: a large state would otherwise be in memory once more, in one piece.
        return None if names is None else {name: broadcast(state.get(name)) for name in names}

    def check_writable(self, calibration: StepwiseCalibration) -> None:
        """Refuse a folder that cannot be written to before a calibration goes on; one that is finished writes nothing.

        Raises:
            ConfigurationError: on all ranks, where the first one cannot write.
        """
        if self.active and not calibration.finished:
            check_on_first_rank(self.trainer, partial(check_writable, self.path.parent))

    def save(self, calibration: StepwiseCalibration) -> None:
        """Write the state, under a temporary name first.

        Of a calibration with thousands of small steps not each is written: where it has an attribute ``worth_saving``
        that is False, it is not, unless it is finished.
        """
        worth = calibration.finished or getattr(calibration, "worth_saving", True)
        if not self.active or not worth or not self.trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as temporary:
            save_file({key: value.contiguous() for key, value in calibration.state_dict().items()}, temporary)
