"""anomalib's GANomaly, unchanged: manual optimization of two optimizers that share a forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.foreign_projects import trainer
from lightning_quant import GradientQuantization
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.nn.structure import quantized_layers

data = pytest.importorskip("anomalib.data")
ganomaly = pytest.importorskip("anomalib.models.image.ganomaly.lightning_model")
pytestmark = pytest.mark.foreign


def collated(images: list[torch.Tensor]) -> Any:
    return data.ImageBatch(image=torch.stack(images), gt_label=torch.zeros(len(images), dtype=torch.bool))


def test_int4_training_of_both_networks(tmp_path: Path) -> None:
    plain = {"post_processor": False, "evaluator": False, "visualizer": False}
    pre = ganomaly.Ganomaly.configure_pre_processor((32, 32))
    module = ganomaly.Ganomaly(batch_size=4, n_features=8, latent_vec_size=16, pre_processor=pre, **plain)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches: Any = DataLoader(list(images), batch_size=4, collate_fn=collated)  # type: ignore[arg-type]
    trainer(tmp_path, GradientQuantization()).fit(module, batches)
    assert is_calibrated(module)
    names = [name for name, _ in quantized_layers(module)]
    assert any("generator" in name for name in names)
    assert any("discriminator" in name for name in names)
