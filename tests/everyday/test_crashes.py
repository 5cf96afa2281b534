"""Killed at any moment: the next start goes on, and ends with the weights of a run that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.crashes import killed, moments, runs, tick
from helpers.diffusion import tiny_unet
from helpers.networks import Images, SmallNet, quantization, trainer
from helpers.small_diffusion import SHAPE, SMALL, Project, batches, parts, quiet_trainer
from helpers.vits import VitData, VitModule, quiet
from lightning_quant import (
    AccuQuant,
    IGQViT,
    load_quantized,
    load_quantized_pipeline,
    save_quantized,
    save_quantized_pipeline,
)
from lightning_quant.accuquant.calibration import Calibration as Windows
from lightning_quant.accuquant.settings import Settings
from lightning_quant.calibration.module import CalibratingModule
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import CheckpointError
from lightning_quant.igq_vit.calibration import Calibration as Groups
from lightning_quant.nn import swap
from lightning_quant.quantizers import FixedQuantizer

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Ticks(pl.Callback):
    """A moment before each batch, and one after it."""

    def on_train_batch_start(self, *arguments: Any) -> None:
        tick()

    def on_train_batch_end(self, *arguments: Any) -> None:
        tick()


class Resumable(DataLoader[Any]):
    """Goes on in the middle of an epoch, as Lightning asks of a stateful loader; others begin their data anew."""

    done = 0

    def __iter__(self) -> Any:
        before = self.done
        for index, batch in enumerate(super().__iter__()):
            if index >= before:
                self.done = (index + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def ticking(step: Callable[..., Any]) -> Any:
    """A moment before each step of a calibration."""

    def ticked(*arguments: Any) -> Any:
        tick()
        return step(*arguments)

    return ticked


def trained(folder: Path) -> None:
    """Two epochs of four batches, which go on from the last checkpoint where there is one."""
    torch.manual_seed(0)
    keep = ModelCheckpoint(folder, every_n_train_steps=3, save_last=True)
    options = {"default_root_dir": folder, "max_epochs": 2, "enable_checkpointing": True}
    module = SmallNet()
    last = folder / "last.ckpt"
    trainer(quantization(quantizer_lr=1e-3), keep, Ticks(), **options).fit(
        module, Resumable(Images(), batch_size=8), ckpt_path=last if last.exists() else None, weights_only=True
    )
    torch.save(module.state_dict(), folder / "end.pt")


def grouped(folder: Path) -> None:
    """IGQ-ViT's callback, before ``test``."""
    Groups.step = ticking(Groups.step)  # type: ignore[method-assign]
    module = VitModule()
    quiet(folder, IGQViT(groups=4, calibration_images=4, cache_dir=str(folder))).test(module, VitData(), verbose=False)
    torch.save(module.state_dict(), folder / "end.pt")


def windowed(folder: Path) -> None:
    """AccuQuant's callback, before ``test``: trajectories, ranges, a block, lengths of windows and updates."""
    Windows.step = ticking(Windows.step)  # type: ignore[method-assign]
    module = Project()
    settings = {**SMALL, "window": "sweep", "updates": 4, "reconstruction": 2}
    ours = AccuQuant(**settings, denoiser="unet", sample_shape=SHAPE, cache_dir=str(folder))
    quiet_trainer(folder, callbacks=[ours]).test(module, batches(), verbose=False)
    torch.save(module.state_dict(), folder / "end.pt")


def end_of(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "end.pt", weights_only=True))


@pytest.mark.parametrize("job", [trained, grouped, windowed])
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.thorough)], ids=["some", "every"])
def test_the_next_start_ends_as_if_nothing_had_been(job: Callable[[Path], None], stride: int, tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    folder.mkdir()
    runs(lambda: job(straight))
    expected = end_of(straight)
    count = 0
    for _ in moments(lambda: job(folder), folder, stride):
        runs(lambda: job(folder))
        found = end_of(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        # What was killed leaves nothing behind when the next one has written.
        assert not [path.name for path in folder.rglob(".*")]
        shutil.rmtree(folder)
        folder.mkdir()
        count += 1
    print(f"{job.__name__}: {count} moments")
    assert count > 3


# -- late --------------------------------------------------------------------------------------------------------------


class Fitted(CalibratingModule):
    """Whose ``fit`` is the calibration, as AccuQuantModule's around a pipeline."""

    calibration_key, callback_name = "accuquant", "AccuQuant"

    def __init__(self, quantization: AccuQuant) -> None:
        super().__init__()
        self.quantization, self.network = quantization, parts().denoiser.network

    def start_calibration(self) -> Windows:
        return self.quantization.start(self.trainer, parts(self.network))

    def state_file(self, calibration: Windows) -> StateFile:
        return self.quantization.state_file(self.trainer, calibration)


def late(folder: Path) -> AccuQuant:
    """As long as by default; the first process is killed after 111 updates."""
    step = Windows.step

    def stepped(self: Windows, *arguments: Any) -> str:
        if self.updates == 111 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    Windows.step = stepped  # type: ignore[method-assign, assignment]
    usual = {name: getattr(Settings(), name) for name in ("updates", "check_every", "patience")}
    return AccuQuant(**{**SMALL, **usual}, denoiser="unet", sample_shape=SHAPE, cache_dir=str(folder))


def late_test(folder: Path) -> None:
    module, ours = Project(), late(folder)
    quiet_trainer(folder, callbacks=[ours]).test(module, batches(), verbose=False)
    torch.save({**module.unet.state_dict(), **ours.record}, folder / "end.pt")


def late_fit(folder: Path) -> None:
    module = Fitted(late(folder))
    quiet_trainer(folder).fit(module)
    torch.save({**module.network.state_dict(), **module.record}, folder / "end.pt")


def late_fit_from_a_checkpoint(folder: Path) -> None:
    module, last = Fitted(late(folder)), folder / "last.ckpt"
    keep = ModelCheckpoint(folder, every_n_train_steps=15, save_last=True)
    module.state_file = lambda calibration: None  # type: ignore[method-assign, assignment, return-value]
    trainer = quiet_trainer(folder, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    torch.save({**module.network.state_dict(), **module.record}, folder / "end.pt")


def test_killed_late_a_calibration_of_the_usual_length_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    straight.mkdir()
    (straight / "killed").touch()
    runs(lambda: late_test(straight))
    expected = end_of(straight)
    for job in (late_test, late_fit, late_fit_from_a_checkpoint):
        folder = tmp_path / job.__name__
        folder.mkdir()
        assert killed(partial(job, folder), at=0, folder=folder)
        runs(partial(job, folder))
        found = end_of(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), job.__name__


# -- artefacts ---------------------------------------------------------------------------------------------------------


def rounded(seed: int) -> Any:
    torch.manual_seed(seed)
    network: Any = tiny_unet()
    for name in ("conv_in", "conv_out"):
        layer = network.get_submodule(name)
        swap(layer, weight_quantizer=FixedQuantizer(4, axis=0, symmetric=False))
        layer.weight_quantizer.initialize(layer.weight * (1 + seed))
    return network.eval()


def output(network: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(torch.ones(1, 3, 8, 8), 10).sample
    return found


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_an_artefact_is_the_old_one_or_the_new_one(pipeline: bool, before: bool, tmp_path: Path) -> None:
    source = tmp_path / "float"
    unquantized: Any = DDIMPipeline(tiny_unet(), DDIMScheduler())
    unquantized.save_pretrained(source)
    folder = tmp_path / "saved" / "model"

    def save(seed: int) -> None:
        if pipeline:
            save_quantized_pipeline(str(source), folder, network=rounded(seed))
        else:
            save_quantized(rounded(seed), folder)

    def load() -> Tensor:
        return output(load_quantized_pipeline(folder).unet if pipeline else load_quantized(folder, model=tiny_unet()))

    known = [output(rounded(seed)) for seed in (0, 1)]
    assert not torch.equal(*known)
    folder.parent.mkdir()
    if before:
        save(0)
    count = 0
    for _ in moments(lambda: save(1), tmp_path / "saved"):
        count += 1
        if before or folder.exists():
            found = load()
            assert any(torch.equal(found, each) for each in known[not before :])
        else:
            with pytest.raises(CheckpointError, match="has no"):
                load()
        # The next save needs nobody's help.
        save(1)
        assert torch.equal(load(), known[1])
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        shutil.rmtree(folder)
        if before:
            save(0)
    print(f"artefact, pipeline {pipeline}: {count} moments")
    assert count > 3
