"""A user's path means one place for all that reads or writes it, and one that cannot be written to is refused early."""

from __future__ import annotations

import ast
import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant
from helpers import small_diffusion
from helpers.artifacts import mlp
from helpers.small_diffusion import SHAPE, SMALL, Project
from helpers.vits import VitData, VitModule
from lightning_quant import (
    AccuQuant,
    CalibrationPictures,
    CIFARDataModule,
    FashionMNISTDataModule,
    GenerationPictures,
    GradientQuantization,
    IGQViT,
    ImageFolderDataModule,
    QuantizationReport,
    SaveQuantized,
    analyze,
    load_from_checkpoint,
)
from lightning_quant.accuquant.conditions import read_prompts
from lightning_quant.accuquant.generation import read_images, write_images
from lightning_quant.accuquant.trajectory_cache import TrajectoryCache
from lightning_quant.calibration.state_file import cache_folder
from lightning_quant.errors import ConfigurationError
from lightning_quant.metrics.fidelity import read_statistics
from lightning_quant.report.trajectories import draw_generation
from lightning_quant.tasks.networks import create_network
from lightning_quant.utilities import paths
from lightning_quant.utilities.paths import check_writable, local_path, trainer_path, user_path

PACKAGE = Path(lightning_quant.__file__).parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another one to work in."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 8), torch.randint(4, (4,))) for _ in range(2)]


def loader() -> DataLoader[Any]:
    images, labels = (torch.cat(each) for each in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1, **quiet}
    return pl.Trainer(callbacks=list(callbacks), **{**own, **arguments})


# -- one door ----------------------------------------------------------------------------------------------------


def test_a_path_is_expanded_and_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    (home / "link").symlink_to("kept")
    for given, meant in {
        "~": home,
        "~/kept/": home / "kept",
        "~/link": home / "kept",
        "$HOME/kept": home / "kept",
        "${SCRATCH}/x": Path("/scratch/x"),
        "../home/./kept": home / "kept",
        "./~": Path.cwd() / "~",
        "$NOWHERE": Path.cwd() / "$NOWHERE",
    }.items():
        assert user_path(given) == user_path(user_path(given)) == meant, given
    assert user_path(Path("~", "kept")) == home / "kept"


@pytest.mark.parametrize("given", ["", "s3://bucket/states", "~nobody-of-this-name/x", "a\0b"])
def test_what_is_no_path_of_this_machine_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match=r": write "):
        user_path(given)


def test_a_name_or_an_address_is_left_as_it_is(home: Path) -> None:
    (home / "last.ckpt").touch()
    for name in ("openai/clip", "s3://bucket/last.ckpt", "~/missing.ckpt"):
        assert local_path(name) == name
    assert local_path("~/last.ckpt") == str(home / "last.ckpt")


def test_what_the_trainer_has_is_not_expanded_again() -> None:
    # CSVLogger("~") writes to a folder of that name.
    assert trainer_path("~/logs") == Path.cwd() / "~/logs"
    with pytest.raises(ConfigurationError, match="is a URL"):
        cache_folder(trainer(default_root_dir="memory://x"), None, "igq_vit")


def test_paths_are_made_and_expanded_at_the_door_alone() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name("open")) | ast.Attribute(attr="expanduser" | "expandvars"):
                    found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
                case ast.Call(func=ast.Name("Path"), args=[argument, *_]) if ast.unparse(argument) != "__file__":
                    found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert not [where for where in found if where.split(":")[0] not in ("utilities/paths.py", "utilities/files.py")]


KEPT: dict[str, Callable[[str], Any]] = {
    "SaveQuantized": lambda path: SaveQuantized(path).folder,
    "QuantizationReport": lambda path: QuantizationReport(path).folder,
    "CalibrationPictures": lambda path: CalibrationPictures(path).folder,
    "GenerationPictures": lambda path: GenerationPictures(path).folder,
    "IGQViT": lambda path: IGQViT(cache_dir=path).cache_dir,
    "AccuQuant": lambda path: AccuQuant(cache_dir=path).cache_dir,
    "TrajectoryCache": lambda path: TrajectoryCache(path).folder,
    "CIFARDataModule": lambda path: CIFARDataModule(path).root,
    "FashionMNISTDataModule": lambda path: FashionMNISTDataModule(path).root,
    "ImageFolderDataModule": lambda path: ImageFolderDataModule(path).root,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_a_path_keeps_the_whole_one(name: str, home: Path) -> None:
    assert KEPT[name]("~/kept") == home / "kept"


def test_what_is_written_below_the_home_folder_is_there(home: Path) -> None:
    module = Module()
    run = trainer(GradientQuantization(), QuantizationReport("~/report", sensitivity=False), SaveQuantized("~/saved"))
    run.fit(module, loader())
    analyze(module, loader(), "~/analysis", sensitivity=False, trainer=trainer())
    write_images("~/images", torch.tensor([3]), torch.zeros(1, 3, 4, 4))
    draw_generation({"accumulated": {"a": torch.rand(5)}, "timesteps": [4, 3, 2, 1]}, "~/pictures")
    torch.save(mlp().state_dict(), home / "weights.pth")
    create_network(mlp(), 5, checkpoint_path="~/weights.pth")
    assert {path.name for path in home.iterdir()} >= {"report", "saved", "analysis", "images", "pictures"}
    assert not list(Path.cwd().rglob("~"))
    assert len(list(read_images("~/images", 1))) == 1


def test_what_is_missing_is_looked_for_below_the_home_folder(home: Path) -> None:
    for read in (read_prompts, read_statistics, lambda path: create_network(mlp(), 5, checkpoint_path=path)):
        with pytest.raises(ConfigurationError, match=f"{home}/missing"):
            read("~/missing")


def test_a_checkpoint_below_the_home_folder_is_loaded(home: Path) -> None:
    run = trainer(GradientQuantization())
    run.fit(Module(), loader())
    run.save_checkpoint(home / "last.ckpt")
    loaded = load_from_checkpoint(Module, "~/last.ckpt")
    again = trainer(GradientQuantization(), default_root_dir=home)
    assert analyze(Module(), loader(), "~", ckpt_path="~/last.ckpt", sensitivity=False, trainer=again).layers
    assert "Quantized" in type(loaded.net[2]).__name__


# -- before the work ---------------------------------------------------------------------------------------------


def test_a_folder_that_can_be_made_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "report")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_takes_nothing_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise OSError(code, "refused")

    monkeypatch.setattr(paths, "TemporaryFile", refused)
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}/report cannot be written to \(refused\)"):
        check_writable(tmp_path / "report")


WRITERS: dict[str, Callable[[str], pl.Callback]] = {
    "QuantizationReport": QuantizationReport,
    "SaveQuantized": SaveQuantized,
    "CalibrationPictures": CalibrationPictures,
    "GenerationPictures": GenerationPictures,
}


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("where", ["a file", "below a file", "without a name"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(
    name: str, stage: str, where: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / {"a file": "file", "below a file": "file/report", "without a name": "x" * 300}[where]
    module = Module()
    run = trainer(GradientQuantization(), WRITERS[name](str(folder)), default_root_dir=tmp_path)
    if (name, stage) == ("GenerationPictures", "fit"):
        run.fit(module, loader())  # which draws nothing
        return
    with pytest.raises(ConfigurationError, match=r"is a file|cannot be written to"):
        getattr(run, stage)(module, loader())
    assert module.steps == 0


def test_an_analysis_of_what_cannot_be_written_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    module = Module()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is a file"):
        analyze(module, loader(), tmp_path / "file", trainer=trainer(GradientQuantization()))
    assert module.steps == 0


METHODS: dict[str, tuple[Any, Any, Any]] = {
    "IGQViT": (partial(IGQViT, 4, 4, groups=4, allocate=False, calibration_images=4), VitModule, VitData),
    "AccuQuant": (partial(AccuQuant, **SMALL, denoiser="unet", sample_shape=SHAPE), Project, small_diffusion.batches),
}


@pytest.mark.parametrize("root", ["default_root_dir", "cache_dir"])
@pytest.mark.parametrize("name", METHODS)
def test_a_calibration_that_cannot_be_kept_is_refused_before_its_first_step(
    name: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module, data = METHODS[name]
    callback = method(cache_dir=tmp_path / "file" / "states" if root == "cache_dir" else None)
    (tmp_path / "file").touch()
    for package in ("igq_vit.calibration", "accuquant.calibration"):
        monkeypatch.setattr(f"lightning_quant.{package}.Calibration.step", lambda *_: pytest.fail("a step"))
    run = trainer(callback, default_root_dir=tmp_path / "file" if root == "default_root_dir" else tmp_path)
    with pytest.raises(ConfigurationError, match=r"is a file, so .* cannot be a folder"):
        run.test(module(), data())


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_calibration_is_taken_from_a_disk_that_is_only_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, module, data = METHODS[name]
    for _ in range(2):
        callback = method(cache_dir=tmp_path)
        trainer(callback).test(module(), data(), verbose=False)
        assert callback.calibration is not None
        monkeypatch.setattr(paths, "TemporaryFile", lambda **_: pytest.fail("written to"))
