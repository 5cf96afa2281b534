"""State of a calibration on disk, so that a stopped one resumes and a finished one is not repeated."""

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
    """Return the folder for the files of a calibration. Default: ``name`` in the Trainer's ``default_root_dir``."""
    return folder or trainer_path(trainer.default_root_dir) / name


class StateFile:
    """File for the state of a calibration, one for each combination of everything on which that depends.

    Args:
        trainer: Trainer, whose first rank writes the file. Its precision is one of the dependencies.
        folder: Folder of the file. None means ``name`` in ``default_root_dir``.
        name: Name of the method.
        parts: Dependencies of the calibration besides the precision, such as the fingerprint of its settings and
            :func:`~lightning_quant.nn.structure.weights_hash`. The file name is a hash of their ``repr``.
        active: Whether to read and write the file. False if a state is not enough to resume from.

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
        """Load the state from an earlier process into a calibration. All ranks get it from the first one.

        Raises:
            CheckpointError: The file is damaged.
        """
        if not self.active:
            return
        state = self._read()
        if state is None:
            return
        device = self.trainer.strategy.root_device
        calibration.load_state_dict({key: value.to(device) for key, value in state.items()})
        what = "loaded" if calibration.finished else f"resumed at step {calibration.done + 1}"
        rank_zero_info(f"Calibration of the same weights, data and settings {what} from {self.path}.")

    def _read(self) -> dict[str, Tensor] | None:
        """Read the state on the first rank and broadcast it, since other ranks may not share its disk."""
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
            raise CheckpointError(f"{self.path} is damaged ({damage}): delete it and calibrate again.")
        # One tensor at a time, since broadcasting a large state at once would take another copy in memory.
        return None if names is None else {name: broadcast(state.get(name)) for name in names}

    def check_writable(self, calibration: StepwiseCalibration) -> None:
        """Raise an error before an unfinished calibration continues if the folder cannot be written to.

        Raises:
            ConfigurationError: The first rank cannot write. Raised on all ranks.
        """
        if self.active and not calibration.finished:
            check_on_first_rank(self.trainer, partial(check_writable, self.path.parent))

    def save(self, calibration: StepwiseCalibration) -> None:
        """Write the state atomically.

        A calibration with thousands of small steps can skip most of them: the state is not written if its attribute
        ``worth_saving`` is False, unless it is finished.
        """
        worth = calibration.finished or getattr(calibration, "worth_saving", True)
        if not self.active or not worth or not self.trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as temporary:
            save_file({key: value.contiguous() for key, value in calibration.state_dict().items()}, temporary)
