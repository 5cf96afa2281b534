"""Beside the callbacks that Lightning ships: what removed its own quantization callback, and what people use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner.tuning import Tuner

from helpers.everyday_projects import PROJECTS, Everyday
from helpers.networks import SmallNet, quantization, trainer
from helpers.vits import VitData
from lightning_quant import load_from_checkpoint, strip
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.nn.structure import quantized_layers

projects = pytest.mark.parametrize("project", PROJECTS.values(), ids=list(PROJECTS))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# -- what Lightning's own callback failed at ---------------------------------------------------------------------------


@projects
def test_the_checkpoint_of_a_quantized_run_is_tested(project: Everyday, tmp_path: Path) -> None:
    module = project.fitted_and_tested(tmp_path)
    path = project.saved(module, tmp_path)
    again = project.module()
    project.trainer(tmp_path / "again", project.callback()).test(again, *project.data(), ckpt_path=path, verbose=False)
    assert torch.equal(project.outputs(again), project.outputs(module))


@projects
def test_a_new_process_loads_the_checkpoint(project: Everyday, tmp_path: Path) -> None:
    module = project.fitted_and_tested(tmp_path)
    path = project.saved(module, tmp_path)
    name = next(name for name, each in PROJECTS.items() if each is project)
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from helpers.everyday_projects import PROJECTS
from lightning_quant import load_from_checkpoint
project = PROJECTS[{name!r}]
loaded = load_from_checkpoint(type(project.module()), {str(path)!r}, weights_only=True)
torch.save((loaded.state_dict(), project.outputs(loaded)), {str(tmp_path / "loaded.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    state, outputs = torch.load(tmp_path / "loaded.pt", weights_only=True)
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].nan_to_num(), value.nan_to_num()) for name, value in expected.items())
    # Of another process, sums may come in another order, and turn single codes.
    torch.testing.assert_close(outputs, project.outputs(module), rtol=0, atol=0.02)


@projects
@pytest.mark.parametrize("before", [False, True])
def test_pruning(project: Everyday, before: bool, tmp_path: Path) -> None:
    module = project.fitted_and_tested(tmp_path, ModelPruning("l1_unstructured", amount=0.5), before=before)
    assert is_calibrated(module)
    # A pruned weight stays zero on the grid.
    zeros = [layer.weight == 0 for _, layer in quantized_layers(module)]
    assert sum(int(zero.sum()) for zero in zeros) >= 0.4 * sum(zero.numel() for zero in zeros)
    for _, layer in quantized_layers(module):
        assert layer.weight_quantizer is not None
        assert layer.weight_quantizer(layer.weight)[layer.weight == 0].eq(0).all()


# -- what people use ---------------------------------------------------------------------------------------------------


@projects
def test_best_and_last_checkpoints_with_early_stopping_and_a_logged_rate(project: Everyday, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    others = [keep, LearningRateMonitor()]
    others += [EarlyStopping("val/loss", patience=1)] if project is not PROJECTS["accuquant"] else []
    options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True, "logger": CSVLogger(tmp_path)}
    run = project.trainer(tmp_path, project.callback(), *others, **options)
    module = project.module()
    run.fit(module, *project.data())
    for which in ("best", "last"):
        run.test(module, *project.data(), ckpt_path=which, verbose=False)
        assert is_calibrated(module)
    for path in (keep.best_model_path, keep.last_model_path):
        again, other = project.module(), project.trainer(tmp_path, project.callback())
        other.test(again, *project.data(), ckpt_path=path, weights_only=True, verbose=False)
        written = torch.load(path, weights_only=True)["state_dict"]
        found = again.state_dict()
        # A calibration that comes after the fit is not in a checkpoint that was written before it.
        assert all(torch.equal(found[name], written[name]) for name, _ in again.named_parameters())
        if project is PROJECTS["int4_training"]:
            quantized = [name for name in found if "quantizer" in name]
            assert quantized
            assert all(torch.equal(found[name], written[name]) for name in quantized)
    assert torch.isfinite(project.outputs(module)).all()


@projects
@pytest.mark.parametrize(
    "other", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1)]
)
def test_averaged_weights(project: Everyday, other: Any, tmp_path: Path) -> None:
    module = project.fitted_and_tested(tmp_path, other(), max_epochs=3)
    assert is_calibrated(module)
    assert torch.isfinite(project.outputs(module)).all()


@projects
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "16-mixed"},
        {"precision": "bf16-mixed"},
    ],
    ids=["clip_norm", "clip_value", "accumulate", "fp16", "bf16"],
)
def test_options_of_the_trainer(project: Everyday, options: dict[str, Any], tmp_path: Path) -> None:
    module = project.fitted_and_tested(tmp_path, **options)
    assert is_calibrated(module)
    assert torch.isfinite(project.outputs(module)).all()


def test_half_precision_with_a_scaler_that_skips_steps(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = SmallNet()
    trainer(quantization(quantizer_lr=1e-3), plugins=[plugin], default_root_dir=tmp_path, max_epochs=12).fit(module)
    # Its first steps overflowed.
    assert scaler.get_scale() < 2.0**40
    assert is_calibrated(module)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


@projects
def test_fit_is_in_float_for_what_is_calibrated(project: Everyday, tmp_path: Path) -> None:
    module, ours = project.module(), project.callback()
    project.trainer(tmp_path, ours).fit(module, *project.data())
    assert is_calibrated(module) == (project is PROJECTS["int4_training"])


def test_a_resumed_fit_with_nothing_left_to_train_keeps_all(tmp_path: Path) -> None:
    first = trainer(quantization(quantizer_lr=1e-3), default_root_dir=tmp_path)
    first.fit(SmallNet())
    first.save_checkpoint(tmp_path / "first.ckpt")
    again = trainer(quantization(quantizer_lr=1e-3), default_root_dir=tmp_path)
    again.fit(SmallNet(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    again.save_checkpoint(tmp_path / "again.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"] for name in ("first", "again")]
    kept = [next(state for name, state in each.items() if "GradientQuantization" in name) for each in states]
    assert kept[0]["batches"] == kept[1]["batches"] > 0
    assert kept[0]["seed"] == kept[1]["seed"]
    assert len(kept[0]["optimizers"]) == len(kept[1]["optimizers"]) == 1


@projects
def test_fit_twice_and_float_again(project: Everyday, tmp_path: Path) -> None:
    module = project.module()
    run = project.trainer(tmp_path, project.callback())
    for _ in range(2):
        run.fit_loop.epoch_progress.reset()
        run.fit(module, *project.data())
        run.test(module, *project.data(), verbose=False)
        assert is_calibrated(module)
    strip(module)
    assert not list(quantized_layers(module))


class Fine(SmallNet):
    """With the parts that BackboneFinetuning asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = self.net[:7]
        self.head: Any = self.net[7:]
        del self.net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.backbone(images))
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("before", [False, True])
def test_a_backbone_that_is_frozen_at_first(before: bool) -> None:
    module, seen = Fine(), list[torch.Tensor]()

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(module.backbone[3].weight.detach().clone())

    thaw, ours = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), quantization()
    trainer(*([thaw, ours] if before else [ours, thaw]), Watch(), max_epochs=3).fit(module)
    assert is_calibrated(module)
    assert not torch.equal(seen[1], seen[0]) or not torch.equal(seen[2], seen[1])


class Sized(SmallNet):
    """With a batch size and a rate to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.lr = 2, 0.1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)


def test_the_tuner_finds_a_batch_size_and_leaves_no_ranges() -> None:
    module, run = Sized(), trainer(quantization())
    Tuner(run).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    assert module.batch_size > 2
    assert not any(layer.weight_quantizer.ready for _, layer in quantized_layers(module) if layer.weight_quantizer)
    run.fit(module)
    assert is_calibrated(module)


def test_the_tuner_finds_a_rate_and_leaves_weights_and_ranges() -> None:
    module, run = Sized(), trainer(quantization())
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    found = Tuner(run).lr_find(module, num_training=20, early_stop_threshold=None)
    assert found is not None
    assert module.lr == found.suggestion() != 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in module.named_parameters())
    assert not any(layer.weight_quantizer.ready for _, layer in quantized_layers(module) if layer.weight_quantizer)
    run.fit(module)
    assert is_calibrated(module)


def test_the_tuner_sizes_batches_of_a_module_that_is_calibrated_later(tmp_path: Path) -> None:
    project, data = PROJECTS["igq_vit"], VitData()
    module, run = project.module(), project.trainer(tmp_path, project.callback())
    Tuner(run).scale_batch_size(module, datamodule=data, max_trials=3, steps_per_trial=1)
    assert data.batch_size > 4
    run.test(module, datamodule=data, verbose=False)
    assert is_calibrated(module)


def test_a_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    module = SmallNet()
    run = trainer(quantization(), max_steps=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert is_calibrated(load_from_checkpoint(SmallNet, tmp_path / "end.ckpt", weights_only=True))
