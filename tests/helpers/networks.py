"""Small modules to train in tests."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_quant.gradient import GradientQuantization


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images whose class can be learned; item i is always the same."""

    def __init__(self, count: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % 3
        self.images = torch.randn(count, 3, 8, 8, generator=generator) + self.labels.view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class SmallNet(pl.LightningModule):
    """Conv, conv, linear; the middle conv is what is quantized by default."""

    def __init__(self, width: int = 8, lr: float = 0.05, decay: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 3),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=self.hparams["decay"])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(), batch_size=8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(), batch_size=8)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(), batch_size=8)


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


def trainer(*callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    return pl.Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": 1} | kwargs))


def quantization(**kwargs: Any) -> GradientQuantization:
    """The callback, all layers quantized."""
    return GradientQuantization(**({"first_and_last": "same"} | kwargs))


def fitted(*callbacks: pl.Callback, seed: int = 0, decay: float = 0.5, **kwargs: Any) -> SmallNet:
    """A SmallNet after fit."""
    pl.seed_everything(seed, verbose=False)
    module = SmallNet(decay=decay)
    trainer(*callbacks, **kwargs).fit(module)
    return module
