"""Lightning's strategies for several processes, with INT4 training in them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from helpers.everyday_projects import PROJECTS
from helpers.networks import QUIET, Images
from helpers.processes import on_ranks
from helpers.small_diffusion import Project, batches
from helpers.vits import VitData, VitModule
from lightning_quant import GradientQuantization, QuantizationError, QuantizationReport, load_from_checkpoint
from lightning_quant.nn.structure import quantized_layers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
sharded = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch needs a GPU"
)


class Blocks(pl.LightningModule):
    """Makes its layers in ``configure_model``, and shards them where there is a mesh."""

    def __init__(self, shard: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters({"shard": False})
        self.shard = shard
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2)]
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), *blocks, nn.Linear(32, 3))
        if self.shard and not isinstance(self.net, FSDPModule):
            mesh: Any = self.device_mesh
            for block in self.net[3:5]:
                fully_shard(block, mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("test/loss", self.training_step(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def trainer_on(strategy: str, ranks: int, folder: Path, whole: bool = False, **options: Any) -> Any:
    chosen: Any = DDPStrategy(process_group_backend="gloo")
    if strategy == "fsdp2":
        distributed = not whole
        chosen = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=distributed)
    callback = GradientQuantization(quantizer_lr=1e-3)
    common = {**QUIET, "devices": ranks, "default_root_dir": folder, "max_epochs": 2, **options}
    return pl.Trainer(strategy=chosen, callbacks=[callback], **common)


def data() -> Any:
    # With the sampler of several processes, whose shares of 33 are made even by repeating.
    return DataLoader(Images(33), batch_size=4)


def state_of(module: Blocks) -> dict[str, list[float]]:
    """Weights in one piece, and quantizers."""
    found: dict[str, Any] = dict(module.named_parameters())
    for name, layer in quantized_layers(module):
        found.update({f"{name}/{key}": value for key, value in layer.named_buffers()})
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in found.items()}
    return {name: value.detach().double().flatten().tolist() for name, value in whole.items()}


def fitted(strategy: str, folder: Path) -> Any:
    def job(rank: int, ranks: int) -> dict[str, list[float]]:
        module = Blocks(strategy == "fsdp2")
        trainer = trainer_on(strategy, ranks, folder)
        trainer.fit(module, data())
        trainer.test(module, data(), verbose=False)
        return state_of(module)

    return job


@sharded
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_training_is_that_of_whole_copies(ranks: int, tmp_path: Path) -> None:
    copies = on_ranks(ranks, fitted("ddp", tmp_path))
    shards = on_ranks(ranks, fitted("fsdp2", tmp_path))
    assert all(other == copies[0] for other in copies)
    assert all(other == shards[0] for other in shards)
    assert any("weight_quantizer" in name for name in copies[0])
    assert copies[0].keys() == shards[0].keys()
    for name, values in copies[0].items():
        assert shards[0][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


def stopped_and_resumed(folder: Path) -> Any:
    def job(rank: int, ranks: int) -> dict[str, list[float]]:
        first = trainer_on("fsdp2", ranks, folder, max_epochs=1)
        first.fit(Blocks(shard=True), data())
        first.save_checkpoint(folder / "shards")
        module = Blocks(shard=True)
        trainer_on("fsdp2", ranks, folder).fit(module, data(), ckpt_path=folder / "shards", weights_only=True)
        return state_of(module)

    return job


@sharded
def test_sharded_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    straight = on_ranks(2, fitted("fsdp2", tmp_path))[0]
    resumed = on_ranks(2, stopped_and_resumed(tmp_path))[0]
    assert (tmp_path / "shards").is_dir()
    assert resumed == straight


@sharded
def test_a_sharded_network_is_saved_whole_and_loaded_by_one_process(tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> dict[str, list[float]]:
        module = Blocks(shard=True)
        trainer = trainer_on("fsdp2", ranks, tmp_path, whole=True)
        trainer.fit(module, data())
        trainer.save_checkpoint(tmp_path / "whole.ckpt")
        return state_of(module)

    expected = on_ranks(2, job)[0]
    loaded = load_from_checkpoint(Blocks, tmp_path / "whole.ckpt", weights_only=True)
    assert state_of(loaded) == expected


@sharded
def test_a_report_does_not_wait_for_pieces_of_weights(tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> bool:
        report = QuantizationReport(str(tmp_path / "report"))
        trainer = trainer_on("fsdp2", ranks, tmp_path)
        trainer.callbacks.append(report)
        trainer.fit(Blocks(shard=True), data())
        return report.report is None

    assert all(on_ranks(2, job))
    assert not (tmp_path / "report").exists()


def test_a_report_of_two_processes_is_written_once(tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> bool:
        report = QuantizationReport(str(tmp_path / "report"))
        trainer = trainer_on("ddp", ranks, tmp_path)
        trainer.callbacks.append(report)
        trainer.fit(Blocks(), data())
        return report.report is None

    assert on_ranks(2, job) == [False, True]
    assert (tmp_path / "report" / "quantization_report.html").is_file()


def test_a_layer_that_is_sharded_by_itself_stays_in_float_with_the_reason(tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> str:
        module = Blocks()
        module.configure_model()
        from torch.distributed.device_mesh import init_device_mesh

        fully_shard(module.net[3][0], mesh=init_device_mesh("cpu", (ranks,)))
        return str(GradientQuantization().plan(module))

    shown = on_ranks(2, job)[0]
    assert "net.3.0" in shown
    assert "passed to fully_shard on its own" in shown


class Sharded(VitModule):
    """Somebody's transformer, divided among ranks."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        fully_shard(self.backbone, mesh=mesh["data_parallel"])


class ShardedDiffusion(Project):
    """Somebody's denoiser, divided among ranks."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        fully_shard(self.unet, mesh=mesh["data_parallel"])


@pytest.mark.parametrize("method", ["igq_vit", "accuquant"])
def test_a_calibration_of_pieces_of_weights_is_refused(method: str, tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> str:
        module: Any = Sharded() if method == "igq_vit" else ShardedDiffusion()
        data = VitData() if method == "igq_vit" else batches()
        ours = PROJECTS[method].callback()
        options = {**QUIET, "devices": ranks, "default_root_dir": tmp_path}
        run = pl.Trainer(strategy=ModelParallelStrategy(ranks, 1), callbacks=[ours], **options)
        with pytest.raises(QuantizationError) as refused:
            run.test(module, data, verbose=False)
        return str(refused.value)

    for said in on_ranks(2, job):
        assert re.match(r"\S+ is sharded across ranks, .* calibrate with strategy='ddp'", said)


def test_torchrun_starts_the_command_line(tmp_path: Path) -> None:
    configs = ["--config", "quickstart.yaml", "--config", "trainer/several_gpus.yaml"]
    ours = ["-m", "lightning_quant", "fit", *configs, "--trainer.max_epochs", "1", "--trainer.sync_batchnorm", "false"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *ours),
            *("--trainer.devices", "2", "--trainer.accelerator", "cpu"),
            *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    checkpoint = next(iter(tmp_path.rglob("*.ckpt")))
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["GradientQuantization"]
    assert state["optimizers"][0]["steps"] == 2
