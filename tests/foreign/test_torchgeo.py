"""torchgeo's tasks, unchanged, with one callback added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from helpers.foreign_projects import trainer
from lightning_quant import GradientQuantization, IGQViT, load_from_checkpoint
from lightning_quant.calibration.module import is_calibrated

trainers = pytest.importorskip("torchgeo.trainers")
pytestmark = pytest.mark.foreign


class Scenes(Dataset[dict[str, torch.Tensor]]):
    """Samples as torchgeo's datasets have them."""

    def __init__(self, size: int, mask: bool) -> None:
        self.size, self.mask = size, mask

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        label = index % 2
        image = torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(index)) + label
        if self.mask:
            return {"image": image, "mask": torch.full((self.size, self.size), label)}
        return {"image": image, "label": torch.tensor(label)}


def loader(size: int, mask: bool = False) -> Any:
    return DataLoader(Scenes(size, mask), batch_size=4)


@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224"])
def test_int4_training_of_a_classification_task(model: str, tmp_path: Path) -> None:
    task = trainers.ClassificationTask(model=model, weights=None, in_channels=3, num_classes=2)
    size = 224 if "vit" in model else 32
    run = trainer(tmp_path, GradientQuantization(), max_steps=2)
    run.fit(task, loader(size), loader(size))
    run.test(task, loader(size), verbose=False)
    assert is_calibrated(task)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = load_from_checkpoint(trainers.ClassificationTask, tmp_path / "last.ckpt")
    images = next(iter(loader(size)))["image"]
    assert torch.equal(again.eval()(images), task.eval()(images))


def test_igq_vit_of_a_classification_task(tmp_path: Path) -> None:
    task = trainers.ClassificationTask(model="vit_tiny_patch16_224", weights=None, in_channels=3, num_classes=2)
    ours = IGQViT(groups=4, calibration_images=8, allocate=False, calibration_data=loader(224))
    trainer(tmp_path, ours).test(task, loader(224), verbose=False)
    assert is_calibrated(task)


@pytest.mark.parametrize("model", ["unet", "deeplabv3+", "fcn"])
def test_int4_training_of_a_segmentation_task(model: str, tmp_path: Path) -> None:
    task = trainers.SemanticSegmentationTask(model=model, backbone="resnet18", weights=None, num_classes=2)
    run = trainer(tmp_path, GradientQuantization(), max_steps=2)
    run.fit(task, loader(64, mask=True), loader(64, mask=True))
    run.test(task, loader(64, mask=True), verbose=False)
    assert is_calibrated(task)


class Boxes(Scenes):
    """With a box to find in each."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        box, label = torch.tensor([[8.0, 8.0, 40.0, 40.0]]), sample.pop("label")
        return {**sample, "bbox_xyxy": box, "label": label[None]}


def listed(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    rest = {key: [sample[key] for sample in samples] for key in ("bbox_xyxy", "label")}
    return {"image": torch.stack([sample["image"] for sample in samples]), **rest}


@pytest.mark.parametrize("model", ["faster-rcnn", "fcos"])
def test_int4_training_of_an_object_detection_task(model: str, tmp_path: Path) -> None:
    task = trainers.ObjectDetectionTask(model=model, backbone="resnet18", weights=None, num_classes=2)
    scenes = DataLoader(Boxes(64, mask=False), batch_size=4, collate_fn=listed)
    run = trainer(tmp_path, GradientQuantization(), max_steps=2)
    run.fit(task, scenes, scenes)
    run.test(task, scenes, verbose=False)
    assert is_calibrated(task)
