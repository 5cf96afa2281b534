"""Networks of segmentation_models_pytorch and lightly in a plain LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.foreign_projects import trainer
from lightning_quant import GradientQuantization, IGQViT, QuantizationError
from lightning_quant.calibration.module import is_calibrated

pytestmark = pytest.mark.foreign


class Plain(pl.LightningModule):
    """Somebody's own, around a network and a loss."""

    def __init__(self, network: Any, loss: Any) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.loss(self, *batch)
        return loss

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("test/loss", self.loss(self, *batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def batches(size: int, *targets: Tensor) -> Any:
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, *targets), batch_size=4)


def segmentation(module: Plain, images: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(images), mask)


@pytest.mark.parametrize("name", ["Unet", "FPN", "Linknet", "Segformer"])
def test_int4_training_of_segmentation_models(name: str, tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = "mit_b0" if name == "Segformer" else "resnet18"
    module = Plain(getattr(smp, name)(encoder, encoder_weights=None, classes=2), segmentation)
    data = batches(64, torch.arange(8).view(-1, 1, 1).expand(8, 64, 64) % 2)
    run = trainer(tmp_path, GradientQuantization(), max_steps=2)
    run.fit(module, data)
    run.test(module, data, verbose=False)
    assert is_calibrated(module)


@pytest.mark.filterwarnings("default:10 layers are still in float")
def test_layers_that_a_decoder_does_not_ask_for_are_named(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    # A PSPNet takes the third of five stages of its encoder, and keeps all.
    module = Plain(smp.PSPNet("resnet18", encoder_weights=None, classes=2), segmentation)
    data = batches(64, torch.arange(8).view(-1, 1, 1).expand(8, 64, 64) % 2)
    with pytest.warns(UserWarning, match=r"10 layers are still in float.*network\.encoder\.layer3\.0\.conv1"):
        trainer(tmp_path, GradientQuantization(), max_steps=2).fit(module, data)


def test_attentions_that_igq_vit_does_not_know_are_refused_by_name(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    module = Plain(smp.Segformer("mit_b0", encoder_weights=None, classes=2), segmentation)
    data = batches(64, torch.zeros(8, 64, 64, dtype=torch.int64))
    with pytest.raises(QuantizationError, match="Attention"):
        trainer(tmp_path, IGQViT(calibration_data=data)).test(module, data, verbose=False)


def contrastive(module: Plain, images: Tensor) -> Tensor:
    lightly_loss = pytest.importorskip("lightly.loss")
    features = [module(images + noise) for noise in (0, 0.1)]
    loss: Tensor = lightly_loss.NTXentLoss()(*features)
    return loss


def test_int4_training_of_simclr(tmp_path: Path) -> None:
    heads = pytest.importorskip("lightly.models.modules.heads")
    timm = pytest.importorskip("timm")
    network = nn.Sequential(timm.create_model("resnet18", num_classes=0), heads.SimCLRProjectionHead(512, 64, 32))
    module = Plain(network, contrastive)
    run = trainer(tmp_path, GradientQuantization(), max_steps=2)
    run.fit(module, batches(32))
    run.test(module, batches(32), verbose=False)
    assert is_calibrated(module)


def test_both_methods_on_the_transformer_of_lightly(tmp_path: Path) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    module = Plain(modules.MaskedVisionTransformerTIMM(vit), contrastive)
    trainer(tmp_path, GradientQuantization(), max_steps=2).fit(module, batches(32))
    assert is_calibrated(module)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    fresh = Plain(modules.MaskedVisionTransformerTIMM(vit), contrastive)
    ours = IGQViT(groups=4, calibration_images=8, allocate=False, calibration_data=batches(32))
    trainer(tmp_path, ours).test(fresh, batches(32), verbose=False)
    assert is_calibrated(fresh)
