"""Small vision transformers to calibrate in tests, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.networks import QUIET
from lightning_quant.igq_vit.calibration import Calibration, Source
from lightning_quant.igq_vit.perturbation import log_posteriors
from lightning_quant.igq_vit.preparation import prepare
from lightning_quant.igq_vit.settings import Settings


def vit(seed: int = 0) -> nn.Module:
    """Two blocks on 1 x 8 x 8 images in 17 tokens of 32 channels, ten classes; LayerNorms with channels that differ."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 2, "embed_dim": 32, "num_heads": 2}
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    return spread(network)


def swin(seed: int = 0) -> nn.Module:
    """Two stages with shifted windows of 2 x 2 on 3 x 16 x 16 images."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 16, "depths": (2, 2)}
    network: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, num_heads=(2, 4), **sizes)
    return spread(network)


def spread(network: nn.Module) -> nn.Module:
    """Channels of different widths and offsets, as trained transformers have them, and a head that is not all zero."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.8)
            nn.init.normal_(module.bias, 0.0, 0.5)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.15)
    return network.eval()


def images(count: int = 8, size: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {"vit": (vit, 8, 1), "swin": (swin, 16, 3)}


def evaluate(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = network(x)
    return output


def calibration(network: nn.Module, x: Tensor, **settings: Any) -> Calibration:
    """Prepared, no step done."""
    chosen = Settings(**({"groups": 4, "calibration_images": len(x)} | settings))
    plan = prepare(network, chosen, x[:1], network)
    return Calibration(Source(network, plan, network, x, log_posteriors))


def finished(found: Calibration) -> Calibration:
    while not found.finished:
        found.step()
    return found


class VitModule(pl.LightningModule):
    """Somebody's module: knows nothing of quantization, takes dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.backbone(x)
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(x=batch["image"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(x=batch["image"]), batch["label"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(x=batch["image"])
        self.seen.append(logits.detach().clone())
        self.log("test/loss", F.cross_entropy(logits, batch["label"]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self(x=batch["image"])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Dicts(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return {"image": image, "label": label}


class VitData(pl.LightningDataModule):
    def __init__(self, train: int = 16, batch_size: int = 4) -> None:
        super().__init__()
        self.train, self.batch_size = train, batch_size

    def loader(self, count: int, seed: int) -> DataLoader[Any]:
        return DataLoader(Dicts(images(count, seed=seed), torch.arange(count) % 10), batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.train, 1)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(8, 2)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(8, 3)

    predict_dataloader = test_dataloader


def quiet(folder: Any, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": 1, "default_root_dir": folder} | kwargs))
