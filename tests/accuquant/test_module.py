"""AccuQuantModule: a pipeline whose fit is its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from helpers.small_diffusion import SMALL, quiet_trainer
from lightning_quant import (
    AccuQuant,
    AccuQuantModule,
    GenerationMetrics,
    load_quantized_pipeline,
    save_quantized_pipeline,
)
from lightning_quant.accuquant.module import FIRST_GENERATED
from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError
from lightning_quant.nn.structure import quantizers_of

SIZES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ddim")
    pipeline: Any = DDIMPipeline(UNet2DModel(**SIZES), DDIMScheduler())
    pipeline.save_pretrained(path)
    return path


def module_of(folder: Path, quantization: dict[str, Any] | None = None, **arguments: Any) -> AccuQuantModule:
    metrics = GenerationMetrics(nn.Flatten(), lpips_net=None)
    settings = AccuQuant(**{**SMALL, **(quantization or {})})
    common = {"images": 6, "image_batch_size": 4, "metrics": metrics}
    return AccuQuantModule(str(folder), **{**common, **arguments}, quantization=settings)


def predicted(trainer: Any, module: AccuQuantModule, **arguments: Any) -> Tensor:
    return torch.cat([batch["images"] for batch in trainer.predict(module, **arguments)])


@pytest.fixture(scope="module")
def calibrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AccuQuantModule, Path]:
    root = tmp_path_factory.mktemp("run")
    module = module_of(folder)
    trainer = quiet_trainer(root)
    trainer.fit(module)
    trainer.save_checkpoint(root / "last.ckpt")
    return module, root


def test_fit_calibrates(calibrated: tuple[AccuQuantModule, Path]) -> None:
    module, _ = calibrated
    assert module.calibration is not None
    assert module.calibration.finished
    module.check_calibrated()


def test_validate_measures_the_held_out_error(calibrated: tuple[AccuQuantModule, Path]) -> None:
    module, root = calibrated
    found = quiet_trainer(root).validate(module, verbose=False)[0]
    expected = module.calibration.errors["end"]  # type: ignore[union-attr]
    assert found["val/error_end"] == pytest.approx(float(expected[-1]), rel=1e-4)
    assert found["val/error_middle"] == pytest.approx(float(expected[len(expected) // 2]), rel=1e-4)


def test_test_compares_with_the_float_images_of_the_same_seeds(calibrated: tuple[AccuQuantModule, Path]) -> None:
    module, root = calibrated
    found = quiet_trainer(root).test(module, verbose=False)[0]
    assert found["test/FID2FP32"] > 0
    assert 5 < found["test/PSNR"] < 100
    report = module.generation_report
    assert report["images"]["float"].shape == report["images"]["quantized"].shape == (6, 1, 8, 8)
    assert len(report["accumulated"]["quantized"]) == SMALL["steps"] + 1 == len(report["timesteps"]) + 1
    assert report["images"]["float"].min() >= 0


def test_a_checkpoint_alone_gives_the_same_images(calibrated: tuple[AccuQuantModule, Path]) -> None:
    module, root = calibrated
    loaded = AccuQuantModule.load_from_checkpoint(root / "last.ckpt", images=6, weights_only=True)
    assert torch.equal(predicted(quiet_trainer(root), loaded), predicted(quiet_trainer(root), module))


def test_images_depend_on_their_numbers_alone(folder: Path, calibrated: tuple[AccuQuantModule, Path]) -> None:
    module, root = calibrated
    images = predicted(quiet_trainer(root), module)
    ids = torch.arange(FIRST_GENERATED, FIRST_GENERATED + 6)
    torch.testing.assert_close(module.generate(ids[[4, 1]]), images[[4, 1]], rtol=1e-4, atol=1e-4)


def test_images_are_written_by_their_numbers(calibrated: tuple[AccuQuantModule, Path], tmp_path: Path) -> None:
    module, root = calibrated
    module.image_folder = tmp_path / "images"
    try:
        quiet_trainer(root).predict(module)
    finally:
        module.image_folder = None
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [f"{n:06d}.png" for n in range(6)]


def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(
    folder: Path, calibrated: tuple[AccuQuantModule, Path], tmp_path: Path
) -> None:
    whole, root = calibrated
    running = module_of(folder, {"cache_dir": str(tmp_path / "a")})
    trainer = quiet_trainer(tmp_path, max_steps=4)
    trainer.fit(running)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    with pytest.raises(QuantizationError, match="stopped after step 4 of 7"):
        quiet_trainer(tmp_path).predict(running)
    going_on = module_of(folder, {"cache_dir": str(tmp_path / "b")})
    quiet_trainer(tmp_path).fit(going_on, ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    assert torch.equal(predicted(quiet_trainer(root), going_on), predicted(quiet_trainer(root), whole))


class Shown(pl.Callback):
    """Keeps the held-out error that is shown after each step."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self.errors.append(float(trainer.progress_bar_metrics.get("calibration/held_out_error", -1)))


def test_the_error_that_is_shown_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rounding_lr": 2e-2, "cache_dir": str(tmp_path / "whole")}
    whole, first, second = Shown(), Shown(), Shown()
    quiet_trainer(tmp_path, callbacks=[whole]).fit(module_of(folder, settings))
    assert whole.errors[-1] < whole.errors[0]
    settings["cache_dir"] = str(tmp_path / "parts")
    quiet_trainer(tmp_path, callbacks=[first], max_steps=5).fit(module_of(folder, settings))
    quiet_trainer(tmp_path, callbacks=[second]).fit(module_of(folder, settings))
    # Of the ranges there is a step, and nothing is shown anew before the next look.
    assert second.errors[1:] == whole.errors[6:]


def test_two_processes_calibrate_and_generate_as_one(
    folder: Path, calibrated: tuple[AccuQuantModule, Path], tmp_path: Path
) -> None:
    whole, root = calibrated
    module = module_of(folder, {"cache_dir": str(tmp_path)})
    saved = ModelCheckpoint(tmp_path, "two", save_top_k=-1, enable_version_counter=False)
    both: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    quiet_trainer(tmp_path, **both, enable_checkpointing=True, callbacks=[saved]).fit(module)
    loaded = AccuQuantModule.load_from_checkpoint(tmp_path / "two.ckpt", images=6, weights_only=True)
    again = module_of(folder, {"cache_dir": str(tmp_path)}, image_folder=str(tmp_path / "images"))
    quiet_trainer(tmp_path, **both).predict(again, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert len(list((tmp_path / "images").iterdir())) == 6
    one, other = predicted(quiet_trainer(root), whole), predicted(quiet_trainer(root), loaded)
    # The order of a sum turns a code here and there, and with it what an image goes on to.
    assert ((other - one).abs() > 5e-2).double().mean() < 0.1
    pairs = zip(quantizers_of(whole.network), quantizers_of(loaded.network), strict=True)
    for (_, first), (_, second) in pairs:
        torch.testing.assert_close(second.scale, first.scale, rtol=2e-3, atol=1e-6)


def test_a_quantized_pipeline_folder_opens_with_the_same_images(
    folder: Path, calibrated: tuple[AccuQuantModule, Path], tmp_path: Path
) -> None:
    module, _ = calibrated
    save_quantized_pipeline(folder, tmp_path / "quantized", network=module.network)
    pipelines: list[Any] = [
        load_quantized_pipeline(tmp_path / "quantized"),
        DDIMPipeline(module.network, DDIMScheduler()),
    ]
    images = [
        pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=6, output_type="np").images
        for pipeline in pipelines
    ]
    assert (images[0] == images[1]).all()


def test_a_float_module_is_not_evaluated(folder: Path, tmp_path: Path) -> None:
    for verb in ("validate", "test", "predict"):
        with pytest.raises(QuantizationError, match=r"not calibrated: call trainer.fit\(module\) first"):
            getattr(quiet_trainer(tmp_path), verb)(module_of(folder))


def test_trajectories_of_another_step_count_are_refused(folder: Path, tmp_path: Path) -> None:
    quiet_trainer(tmp_path).fit(module_of(folder, {"cache_dir": str(tmp_path)}))
    with pytest.raises(CheckpointError, match=r"have other settings \(step count 6 there, 8 here\)"):
        quiet_trainer(tmp_path).fit(module_of(folder, {"cache_dir": str(tmp_path), "steps": 8}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "images=0: expected"),
        ({"prompts": "prompts.txt"}, "a ddpm model takes none"),
        ({"classes": 10}, "classes=10: a ddpm model takes none"),
        ({"quantization": {"guidance": 3.0}}, "no unconditional branch"),
        ({"quantization": {"window": 7}}, "window=7 is longer than the trajectory of 6 steps"),
    ],
)
def test_what_the_model_has_no_use_for_is_said(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        module_of(folder, **arguments)


def test_a_pipeline_without_scheduler_is_refused(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    copied = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copied / "scheduler")
    index = json.loads((copied / "model_index.json").read_text())
    del index["scheduler"]
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="scheduler"):
        AccuQuantModule(str(copied))


def test_an_image_folder_that_cannot_be_written_to_is_refused_before_the_first_image(
    calibrated: tuple[AccuQuantModule, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, root = calibrated
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "image_folder", tmp_path / "file")
    monkeypatch.setattr(module, "generate", lambda *_: pytest.fail("an image"))
    with pytest.raises(ConfigurationError, match="file is a file"):
        quiet_trainer(root).predict(module)
