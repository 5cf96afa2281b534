"""IGQViTModule: its fit is the calibration, and all around it is Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from helpers.vits import quiet, spread, vit
from lightning_quant import DigitsDataModule, IGQViT, IGQViTModule, QuantizationError, load_quantized, save_quantized
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from lightning_quant.igq_vit.calibration import Calibration

SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 2, "embed_dim": 32, "num_heads": 2}


def module(**settings: Any) -> IGQViTModule:
    torch.manual_seed(0)
    found = IGQViTModule(
        "vit_tiny_patch16_224",
        10,
        model_kwargs=SIZES,
        quantization=IGQViT(**({"groups": 4, "calibration_images": 8} | settings)),
    )
    spread(found.network)
    return found


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=64)


def logits(found: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = found.eval()(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    return output


def test_fit_calibrates_and_test_is_quantized(tmp_path: Path) -> None:
    found = module()
    before = logits(found)
    trainer = quiet(tmp_path, max_epochs=7)
    trainer.fit(found, data())
    assert found.calibration is not None
    assert found.calibration.finished
    assert trainer.global_step == found.calibration.total == 13
    assert is_calibrated(found)
    assert (logits(found) - before).abs().max() > 1e-3
    assert "test/acc" in trainer.test(found, data(), verbose=False)[0]


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resumed_from_any_checkpoint_it_ends_the_same(stop: int, tmp_path: Path) -> None:
    straight = module()
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet(tmp_path, every, enable_checkpointing=True).fit(straight, data())
    again = module()
    trainer = quiet(tmp_path)
    trainer.fit(again, data(), ckpt_path=str(tmp_path / f"step={stop}.ckpt"))
    assert again.calibration is not None
    assert straight.calibration is not None
    assert again.calibration.groups == straight.calibration.groups
    assert torch.equal(logits(again), logits(straight))


def test_a_calibration_that_is_not_finished_is_not_tested(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    found = module()
    quiet(tmp_path, every, enable_checkpointing=True).fit(found, data())
    for stop in (1, 11):
        with pytest.raises(QuantizationError, match=rf"stopped after step {stop} of 13, .*: continue with trainer.fit"):
            quiet(tmp_path).test(found, data(), ckpt_path=str(tmp_path / f"step={stop}.ckpt"))
    quiet(tmp_path).test(found, data(), ckpt_path=str(tmp_path / "step=13.ckpt"), verbose=False)


def test_interrupted_it_says_so_and_goes_on_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, step = module(), Calibration.step

    def interrupted(self: Calibration, *args: Any) -> str:
        if self.done == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Calibration, "step", interrupted)
    with pytest.raises(SystemExit):
        quiet(tmp_path).fit(found, data())
    monkeypatch.setattr(Calibration, "step", step)
    with pytest.raises(QuantizationError, match="stopped after step 4 of 13"):
        quiet(tmp_path).test(found, data())
    trainer = quiet(tmp_path)
    trainer.fit(found, data())
    assert trainer.global_step == 9
    straight = module()
    quiet(tmp_path / "straight").fit(straight, data())
    assert torch.equal(logits(found), logits(straight))


def test_taken_from_the_cache_it_writes_a_checkpoint_too(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        written = ModelCheckpoint(tmp_path / folder, filename="last")
        quiet(tmp_path, written, enable_checkpointing=True).fit(module(allocate=False), data())
    first, second = (IGQViTModule.load_from_checkpoint(tmp_path / f / "last.ckpt") for f in ("first", "second"))
    assert torch.equal(logits(first), logits(second))


def test_other_images_than_a_checkpoint_began_with_are_refused(tmp_path: Path) -> None:
    quiet(tmp_path, ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=1), enable_checkpointing=True).fit(
        module(), data()
    )
    other = module(calibration_data=torch.zeros(8, 1, 8, 8))
    with pytest.raises(CheckpointError, match="or other images: calibrate again"):
        quiet(tmp_path).fit(other, data(), ckpt_path=str(tmp_path / "one.ckpt"))


def test_a_checkpoint_rebuilds_module_and_settings_alone(tmp_path: Path) -> None:
    found = module(weight_bits=6, allocate=False)
    trainer = quiet(tmp_path)
    trainer.fit(found, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = IGQViTModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.quantization.settings == found.quantization.settings
    assert torch.equal(logits(loaded), logits(found))
    fresh = module(weight_bits=6, allocate=False)
    (result,) = quiet(tmp_path).test(fresh, data(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert result == quiet(tmp_path).test(found, data(), verbose=False)[0]


def test_saved_as_a_folder_it_is_built_again_alone(tmp_path: Path) -> None:
    found = module(allocate=False)
    quiet(tmp_path).fit(found, data())
    loaded = load_quantized(save_quantized(found, tmp_path / "folder"))
    assert isinstance(loaded, IGQViTModule)
    assert torch.equal(logits(loaded), logits(found))


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_without_a_calibration_it_refuses(verb: str, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"not calibrated: call trainer.fit"):
        getattr(quiet(tmp_path), verb)(module(), data())


def test_without_images_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="calibrates on images of a datamodule"):
        quiet(tmp_path).fit(module())


def test_networks_come_from_timm_torchvision_or_python() -> None:
    assert len(IGQViTModule(vit(), 10, quantization={"groups": 2}).network.state_dict()) > 0
    with pytest.raises(UnsupportedModelError, match="has no attention"):
        IGQViTModule("resnet18", 10)
    with pytest.raises(ConfigurationError, match="weight_bits=1"):
        IGQViTModule(vit(), 10, quantization={"weight_bits": 1})


def test_a_network_of_torchvision_is_calibrated(tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    class Colours(DigitsDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0].repeat(1, 3, 1, 1), batch[1]

    torch.manual_seed(0)
    network = spread(VisionTransformer(8, 2, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10))
    colors = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantization = IGQViT(groups=4, calibration_images=8, allocate=False, calibration_data=colors)
    found = IGQViTModule(network, 10, quantization=quantization)
    trainer = quiet(tmp_path)
    trainer.fit(found, Colours(64))
    assert is_calibrated(found)
    assert isinstance(trainer, pl.Trainer)
    assert "test/acc" in trainer.test(found, Colours(64), verbose=False)[0]
