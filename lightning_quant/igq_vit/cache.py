"""What the state of a calibration is known again by on disk: weights, settings, images and precision."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_quant.data.calibration import fingerprint
from lightning_quant.igq_vit.session import Calibration
from lightning_quant.nn.hashing import weights_hash
from lightning_quant.quantizers.statistics import gather
from lightning_quant.tasks.calibration_files import StateFile


def state_file(trainer: pl.Trainer, folder: Path | None, calibration: Calibration) -> StateFile:
    """The file of a prepared calibration.

    Args:
        trainer: says which rank writes and where.
        folder: None is ``igq_vit`` in ``default_root_dir``.
        calibration: to save and load.
    """
    source = calibration.source
    # "repq" changes weights, and has one step: there is nothing to go on from.
    active = source.plan.settings.scheme != "repq"
    parts = calibration.fingerprint(), weights_hash(source.network)
    return StateFile(trainer, folder, "igq_vit", *parts, active=active)


def images_hash(images: Tensor, device: torch.device) -> str:
    """SHA-256 over the calibration images of all ranks, the same however they are divided.

    Args:
        images: this rank's.
        device: where ranks exchange tensors.
    """
    own = torch.tensor([list(bytes.fromhex(fingerprint(image))) for image in images], device=device)
    return hashlib.sha256(repr(sorted(gather(own).tolist())).encode()).hexdigest()
