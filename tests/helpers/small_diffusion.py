"""A denoiser of three convolutions, with all that a calibration needs, for tests that calibrate many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quant.accuquant.calibration import Calibration
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.preparation import Parts, start
from lightning_quant.accuquant.settings import Settings

SHAPE = (1, 4, 4)
SMALL: dict[str, Any] = {
    "steps": 6,
    "window": 2,
    "updates": 6,
    "check_every": 2,
    "batch_size": 4,
    "trajectories": 8,
    "held_out": 4,
    "weight_bits": 3,
    "activation_bits": 6,
}


class SmallDenoiser(nn.Module):
    """(n, 1, 4, 4) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 1, 1)
        self.time = nn.Linear(1, 6)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep.float().view(-1, 1) / 1000)
        hidden = nn.functional.silu(self.first(sample) + shift[..., None, None])
        output: Tensor = self.last(nn.functional.silu(self.middle(hidden)))
        return output


class Project(pl.LightningModule):
    """Somebody's module, which knows nothing of quantization: it samples in ``test`` and ``predict``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = SmallDenoiser()
        self.noise_scheduler: Any = DDIMScheduler()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor) -> Tensor:
        t = torch.full((len(batch),), 500)
        loss: Tensor = (self.unet(batch, timestep=t) - batch).square().mean()
        return loss

    def validation_step(self, batch: Tensor) -> None:
        self.test_step(batch)

    def test_step(self, batch: Tensor) -> None:
        self.seen.append(self.predict_step(batch))

    def predict_step(self, batch: Tensor) -> Tensor:
        output: Tensor = self.unet(batch, torch.full((len(batch),), 300))
        return output

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def batches() -> DataLoader[Tensor]:
    """Two of four noises."""
    noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    return DataLoader(noise, batch_size=4)  # type: ignore[arg-type]


def quiet_trainer(root: Path, **arguments: Any) -> pl.Trainer:
    """On the CPU, nothing shown."""
    common: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": root,
    }
    return pl.Trainer(**{**common, **arguments})


def parts(network: nn.Module | None = None, scheduler: Any = None) -> Parts:
    """Of a seeded network."""
    torch.manual_seed(0)
    found = (SmallDenoiser() if network is None else network).eval()
    return Parts(Denoiser(found), scheduler or DDIMScheduler(), SHAPE)


def started(root: Path, scheduler: Any = None, **settings: Any) -> Calibration:
    """A calibration before its first step."""
    return start(quiet_trainer(root), parts(scheduler=scheduler), Settings(**{**SMALL, **settings}), root / "cache")


def finished(calibration: Calibration) -> Calibration:
    """After its last."""
    while not calibration.finished:
        calibration.step()
    return calibration
