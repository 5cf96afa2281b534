"""Environment of a run: machine, versions, command, configuration and hashes."""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_quant.nn.structure import weights_hash
from lightning_quant.utilities.hashing import file_hash
from lightning_quant.utilities.paths import trainer_path

_LIBRARIES = ("lightning-quant", "torch", "lightning", "torchvision", "timm", "diffusers", "torchmetrics")


def environment_of(trainer: pl.Trainer, network: nn.Module, stage: str) -> dict[str, str]:
    """Return device, versions, command, seed and hashes of a run as text, keyed by their names on the page."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    libraries = []
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            libraries.append(f"{name} {version(name)}")
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(PurePath(word).name if index == 0 else word for index, word in enumerate(sys.argv)),
        "device": f"{device.type}, {hardware}, {torch.get_num_threads()} threads, {trainer.world_size} processes",
        "precision": str(trainer.precision),
        "seed": os.environ.get("PL_GLOBAL_SEED", "not set"),
        "versions": f"Python {platform.python_version()}, {', '.join(libraries)}",
        "SHA-256 of the float weights": weights_hash(network),
        **_artefacts(trainer, written=stage == "fit"),
    }


def _artefacts(trainer: pl.Trainer, written: bool) -> dict[str, str]:
    """Hash the checkpoint that the run has read, and the best and the last one that a fit has written."""
    origins = {trainer.ckpt_path: "read"}
    for callback in trainer.checkpoint_callbacks if written else []:
        for name in ("best_model_path", "last_model_path"):
            origins.setdefault(getattr(callback, name, None), "written")
    # Other paths are on another machine or in the cloud.
    local = {trainer_path(path): origin for path, origin in origins.items() if path and "://" not in str(path)}
    files = {path: origin for path, origin in local.items() if path.is_file()}
    return {f"SHA-256 of {path}": f"{file_hash(path)}, {origin}" for path, origin in files.items()}


def config_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Return the configuration of the command line, or the module's name and hyperparameters."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        parser, config = getattr(callback, "parser", None), getattr(callback, "config", None)
        if parser is not None and config is not None:
            text: str = parser.dump(config, skip_none=True)
            return text
    hyperparameters = "\n".join(f"{name}: {value}" for name, value in pl_module.hparams.items())
    return f"{type(pl_module).__name__}\n{hyperparameters}".strip()


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, on the GPU if one was used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource  # not available on Windows

    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
