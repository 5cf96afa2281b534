"""SaveQuantized: what was quantized is in a folder when the run ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.artifacts import mlp, quantized
from helpers.networks import SmallNet, quantization, trainer
from helpers.vits import VitData, VitModule, images, quiet
from lightning_quant import IGQViT, SaveQuantized, load_quantized, save_quantized
from lightning_quant.errors import ConfigurationError


def test_a_test_and_a_float_fit(tmp_path: Path) -> None:
    module, folder = VitModule(), tmp_path / "saved"
    quiet(tmp_path, SaveQuantized(str(folder))).fit(module, VitData())
    assert not folder.exists()
    settings = IGQViT(groups=4, calibration_images=8, allocate=False)
    quiet(tmp_path, settings, SaveQuantized(str(folder))).test(module, VitData())
    loaded = load_quantized(folder, model=VitModule())
    assert torch.equal(loaded(images(3)), module.eval()(images(3)))


def test_a_trial_run_replaces_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_quantized(quantized(mlp()), tmp_path / "saved")
    before = (tmp_path / "saved" / "quantization.json").read_text(encoding="utf-8")
    trial = trainer(quantization(), SaveQuantized(tmp_path / "saved"), fast_dev_run=1, default_root_dir=tmp_path)
    trial.fit(SmallNet())
    assert (tmp_path / "saved" / "quantization.json").read_text(encoding="utf-8") == before
    assert "is not replaced" in caplog.text


def test_a_folder_with_other_files_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        quiet(tmp_path, SaveQuantized(str(tmp_path))).test(VitModule(), VitData())
