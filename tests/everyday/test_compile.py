"""Modules that somebody compiled are trained and calibrated to what they are without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from everyday_projects import PROJECTS
from lightning_quant import AccuQuant, IGQViT, QuantizationReport
from lightning_quant.tasks.calibration import is_calibrated
from networks import SmallNet, quantization
from networks import trainer as training
from small_diffusion import SHAPE, SMALL, Project, batches, quiet_trainer
from vits import VitData, VitModule, quiet


def compiled(module: Any, name: str | None) -> Any:
    """The module, or one of its parts, compiled without a backend that takes minutes."""
    if name is None:
        return torch.compile(module, backend="eager")
    setattr(module, name, torch.compile(getattr(module, name), backend="eager"))
    return module


def vit(folder: Path) -> tuple[Trainer, Any, Any]:
    return quiet(folder, IGQViT(groups=4, calibration_images=8, allocate=False)), VitModule(), VitData()


def diffusion(folder: Path) -> tuple[Trainer, Any, Any]:
    callback = AccuQuant(**SMALL, denoiser="unet", sample_shape=SHAPE)
    return quiet_trainer(folder, callbacks=[callback]), Project(), batches()


@pytest.mark.parametrize(("make", "part"), [(vit, None), (vit, "backbone"), (diffusion, None), (diffusion, "unet")])
def test_a_calibration_and_the_test_after_it(make: Any, part: str | None, tmp_path: Path) -> None:
    outputs = []
    for which in ("plain", "compiled"):
        trainer, module, data = make(tmp_path / which)
        given = module if which == "plain" else compiled(module, part)
        trainer.test(given, data, verbose=False)
        assert is_calibrated(module)
        outputs.append(torch.cat(module.seen))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def test_what_was_compiled_in_float_is_quantized_all_the_same(tmp_path: Path) -> None:
    trainer, module, data = vit(tmp_path)
    images = next(iter(data.test_dataloader()))["image"]
    module.backbone = torch.compile(module.backbone, backend="eager")
    module.eval()
    with torch.inference_mode():
        in_float = module(images).clone()
    trainer.test(module, data, verbose=False)
    with torch.inference_mode():
        assert not torch.allclose(module(images), in_float, atol=1e-3)
        torch.testing.assert_close(module(images), module.seen[0])


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("name", list(PROJECTS))
def test_a_report_has_the_same_figures(name: str, part: bool, tmp_path: Path) -> None:
    found = []
    for which in ("plain", "compiled"):
        torch.manual_seed(0)
        project, report = PROJECTS[name], QuantizationReport(str(tmp_path / which))
        module = project.module()
        attribute = {"int4_training": "net", "igq_vit": "backbone", "accuquant": "unet"}[name] if part else None
        given = module if which == "plain" else compiled(module, attribute)
        run = project.trainer(tmp_path / which, project.callback(), report)
        run.fit(given, *project.data())
        run.test(given, *project.data(), verbose=False)
        assert report.analysis is not None
        layers = {layer.name.replace("_orig_mod.", ""): layer for layer in report.analysis.layers}
        found.append({layer: (each.only_quantized, each.only_float) for layer, each in layers.items()})
    assert found[0] == {name: pytest.approx(values, rel=1e-3, abs=1e-5) for name, values in found[1].items()}


@pytest.mark.parametrize("part", [None, "net"])
def test_int4_training(part: str | None) -> None:
    states = []
    for which in ("plain", "compiled"):
        torch.manual_seed(0)
        module = SmallNet()
        given: LightningModule = module if which == "plain" else compiled(module, part)
        training(quantization(), max_steps=3).fit(given)
        states.append([value for _, value in sorted(module.state_dict().items())])
    for plain, other in zip(*states, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
