"""The state of a calibration on disk, so that a stopped one goes on and a finished one is not repeated."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from lightning_quant.data.calibration import fingerprint
from lightning_quant.errors import CheckpointError
from lightning_quant.igq_vit.session import Calibration
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.statistics import gather


class Cache:
    """One file for each combination of weights, settings, images and precision.

    Args:
        trainer: says which rank writes and where.
        folder: None is ``igq_vit`` in ``default_root_dir``.
        calibration: to save and load, prepared.
    """

    def __init__(self, trainer: pl.Trainer, folder: str | None, calibration: Calibration) -> None:
        self.trainer, self.calibration = trainer, calibration
        # This scheme changes weights, and has one step: there is nothing to go on from.
        self.active = calibration.source.plan.settings.scheme != "repq"
        home = Path(trainer.default_root_dir) / "igq_vit" if folder is None else Path(folder)
        parts = (calibration.fingerprint(), weights_hash(calibration.source.network), str(trainer.precision))
        self.path = home / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.safetensors"

    def load(self) -> None:
        """Take over what an earlier process computed; all ranks take it from the first."""
        if not self.active:
            return
        content: bytes | None = None
        if self.trainer.is_global_zero and self.path.is_file():
            content = self.path.read_bytes()
        content = self.trainer.strategy.broadcast(content)
        if content is None:
            return
        try:
            state = load(content)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is damaged ({error}): delete it, and calibrate anew.") from error
        device = next(self.calibration.source.network.parameters()).device
        self.calibration.load_state_dict({key: value.to(device) for key, value in state.items()})
        what = "taken" if self.calibration.finished else f"goes on at step {self.calibration.done + 1}"
        rank_zero_info(f"Calibration of the same weights, images and settings {what} from {self.path}.")

    def save(self) -> None:
        """Write the state, under a temporary name first."""
        if not self.active or not self.trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        save_file({key: value.contiguous() for key, value in self.calibration.state_dict().items()}, temporary)
        temporary.replace(self.path)


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over the parameters and buffers of a network, quantizers left out."""
    digest = hashlib.sha256()
    quantizers = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Quantizer))
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not name.startswith(quantizers):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def images_hash(images: Tensor, device: torch.device) -> str:
    """SHA-256 over the calibration images of all ranks, the same however they are divided.

    Args:
        images: this rank's.
        device: where ranks exchange tensors.
    """
    own = torch.tensor([list(bytes.fromhex(fingerprint(image))) for image in images], device=device)
    return hashlib.sha256(repr(sorted(gather(own).tolist())).encode()).hexdigest()
