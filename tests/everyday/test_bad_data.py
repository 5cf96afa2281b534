"""NaN, nothing, images of another size and workers that die: what a run does then, and that no range is spoilt."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from helpers.everyday_projects import PROJECTS, Everyday
from helpers.networks import Images, SmallNet, quantization, trainer
from helpers.processes import on_ranks
from helpers.small_diffusion import SHAPE
from helpers.vits import Dicts, VitData, VitModule, images, quiet
from lightning_quant import IGQViT
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.errors import QuantizationError
from lightning_quant.nn.structure import is_quantized, quantizers_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
projects = pytest.mark.parametrize("name", list(PROJECTS))
NAN, INF = float("nan"), float("inf")
PIXELS = {"nan": NAN, "inf": INF, "big": 1e30}
# Of what it had put into shared memory PyTorch says that its connection is gone.
DIED = (RuntimeError, ConnectionError, EOFError)
WORKER_DIED = r"worker .* exited unexpectedly|Connection|^$"


def state_of(module: Any) -> dict[str, Tensor]:
    """All that quantizers hold."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, quantizer in quantizers_of(module)
        for key, value in quantizer.named_buffers()
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key].nan_to_num(-1), value.nan_to_num(-1)) for key, value in expected.items()
    )


def called(name: str, module: Any, bad: float | None) -> Tensor:
    """The module on three images of which one has a bad pixel, or on none."""
    shape = {"int4_training": (3, 8, 8), "igq_vit": (1, 8, 8), "accuquant": SHAPE}[name]
    x = torch.randn(0 if bad is None else 3, *shape, generator=torch.Generator().manual_seed(0))
    if bad is not None:
        x[1, 0, 0, 0] = bad
    with torch.no_grad():
        output: Tensor = module.eval().unet(x, torch.full((len(x),), 300)) if name == "accuquant" else module.eval()(x)
    return output


@projects
def test_what_is_evaluated_changes_no_range(name: str, tmp_path: Path) -> None:
    project = PROJECTS[name]
    module = project.fitted_and_tested(tmp_path)
    before, outputs = state_of(module), project.outputs(module)
    clean = called(name, module, 0.0)
    for bad in (NAN, INF):
        # The others of its batch are as they would be without it.
        assert torch.equal(called(name, module, bad)[[0, 2]], clean[[0, 2]])
        assert same(state_of(module), before)
    assert len(called(name, module, None)) == 0
    assert same(state_of(module), before)
    assert torch.equal(project.outputs(module), outputs)


# -- training ----------------------------------------------------------------------------------------------------------


class Careful(SmallNet):
    """Somebody's module that leaves out gradients that are no numbers, so that its weights outlive a bad batch."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not all(bool(g.isfinite().all()) for g in gradients):
            for gradient in gradients:
                gradient.zero_()


class Watch(pl.Callback):
    """Quantizers after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        self.states.append(state_of(pl_module))


def batch(kind: str) -> list[Tensor]:
    size = 12 if kind == "another size" else 8
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4) % 3
    if kind in PIXELS:
        x[2, 1, 3, 3] = PIXELS[kind]
    return [x[:0], y[:0]] if kind == "empty" else [x, y]


class Given(Dataset[Any]):
    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> list[Tensor]:
        return batch(self.kinds[index])


def watched(folder: Path, kinds: list[str]) -> tuple[Careful, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    module, watch = Careful(), Watch()
    run = trainer(quantization(quantizer_lr=1e-2), watch, default_root_dir=folder, limit_val_batches=0)
    run.fit(module, DataLoader(Given(kinds), batch_size=None))
    return module, watch.states


@pytest.mark.parametrize("kind", ["nan", "empty"])
def test_a_bad_batch_in_training_leaves_every_range_as_it_was(kind: str, tmp_path: Path) -> None:
    _, states = watched(tmp_path, ["good", "good", kind, "good"])
    assert not same(states[1], states[0])
    assert same(states[2], states[1])
    assert not same(states[3], states[2])
    assert all(bool(value.isfinite().all()) for value in states[3].values())


def test_an_infinite_pixel_in_training_is_clipped_as_any_other_outlier(tmp_path: Path) -> None:
    _, infinite = watched(tmp_path, ["good", "inf", "good"])
    _, big = watched(tmp_path, ["good", "big", "good"])
    assert all(same(found, expected) for found, expected in zip(infinite, big, strict=True))
    assert all(bool(value.isfinite().all()) for value in infinite[-1].values())


@pytest.mark.parametrize("kind", ["nan", "inf", "empty"])
def test_ranges_start_with_the_first_batch_that_can_be_used(kind: str, tmp_path: Path) -> None:
    module, states = watched(tmp_path, [kind, "good", "good"])
    assert is_calibrated(module)
    ranges = [value for key, value in states[0].items() if key.endswith("input_quantizer.range")]
    assert ranges
    # An infinite pixel is no NaN for the layers behind a first one that clips nothing yet.
    assert all(bool(value.isnan()) for value in ranges)
    assert all(bool(value.isfinite().all()) for value in states[-1].values())


def test_images_of_another_size_are_trained_on_where_the_network_takes_them(tmp_path: Path) -> None:
    _, states = watched(tmp_path, ["good", "another size", "good"])
    assert not same(states[1], states[0])
    assert all(bool(value.isfinite().all()) for value in states[-1].values())


# -- calibration -------------------------------------------------------------------------------------------------------


def data_with(kind: str) -> Any:
    x = images(8, seed=4)
    if kind in PIXELS:
        x[3, 0, 2, 2] = PIXELS[kind]
    items: list[Any] = [{"image": image, "label": torch.tensor(0)} for image in x]
    if kind == "another size":
        items[3]["image"] = torch.randn(1, 12, 12)
    return DataLoader(items, batch_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "pixels of a calibration batch are NaN or infinite"),
        ("inf", "pixels of a calibration batch are NaN or infinite"),
        ("another size", r"Calibration images have different sizes: \(1, 12, 12\), \(1, 8, 8\)"),
    ],
)
def test_bad_calibration_images_are_refused_and_the_network_stays_in_float(
    kind: str, message: str, tmp_path: Path
) -> None:
    module = VitModule()
    ours = IGQViT(groups=4, calibration_images=8, allocate=False, calibration_data=data_with(kind))
    with pytest.raises(QuantizationError, match=message):
        quiet(tmp_path, ours).test(module, VitData(), verbose=False)
    assert not is_quantized(module)
    good = IGQViT(groups=4, calibration_images=8, allocate=False)
    quiet(tmp_path, good).test(module, VitData(), verbose=False)
    assert is_calibrated(module)


@pytest.mark.parametrize(("value", "what"), [(NAN, "NaN"), (INF, "infinite values")])
def test_a_denoiser_with_nan_is_refused_and_stays_in_float(value: float, what: str, tmp_path: Path) -> None:
    project: Everyday = PROJECTS["accuquant"]
    module = project.module()
    torch.nn.init.constant_(module.unet.last.bias, value)
    with pytest.raises(QuantizationError, match=rf"contains {what} at step 0 \(timestep"):
        project.trainer(tmp_path, project.callback()).test(module, *project.data(), verbose=False)
    assert not is_quantized(module)
    torch.nn.init.zeros_(module.unet.last.bias)
    project.trainer(tmp_path, project.callback()).test(module, *project.data(), verbose=False)
    assert is_calibrated(module)


def test_an_empty_batch_among_calibration_images_changes_nothing(tmp_path: Path) -> None:
    whole, found = images(8, seed=4), []
    for batches in ([whole[:4], whole[4:]], [whole[:4], whole[:0], whole[4:]]):
        module = VitModule()
        data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        ours = IGQViT(groups=4, calibration_images=8, allocate=False, calibration_data=data)
        quiet(tmp_path / str(len(batches)), ours).test(module, VitData(), verbose=False)
        found.append(state_of(module))
    assert same(*found)


# -- one of several ranks ----------------------------------------------------------------------------------------------


def on_two(folder: Path, *callbacks: pl.Callback, **options: Any) -> Any:
    strategy = DDPStrategy(process_group_backend="gloo")
    common = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "default_root_dir": folder}
    return trainer(*callbacks, limit_val_batches=0, **common, **options)


@pytest.mark.parametrize("kind", ["nan", "empty"])
def test_a_bad_batch_on_one_rank_spoils_no_range_on_any(kind: str, tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> tuple[set[str], list[float]]:
        torch.manual_seed(0)
        module, watch = Careful(), Watch()
        kinds = ["good", "good", kind if rank else "good", "good"]
        on_two(tmp_path, quantization(quantizer_lr=1e-2), watch).fit(module, DataLoader(Given(kinds), batch_size=None))
        before, after, *_, end = watch.states[1:]
        moved = {key.rpartition(".")[2] for key, value in after.items() if not torch.equal(value, before[key])}
        return moved, [float(value.double().sum()) for value in end.values()]

    one, other = on_ranks(2, job)
    assert one == other
    # The good gradients of the other rank move intervals all the same; what is empty moves nothing by itself.
    assert one[0] == ({"gamma"} if kind == "nan" else {"gamma", "range"})
    assert all(map(math.isfinite, one[1]))


def test_bad_calibration_images_of_one_rank_are_refused_on_all(tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> tuple[str, bool]:
        module = VitModule()
        ours = IGQViT(groups=4, calibration_images=8, allocate=False, calibration_data=data_with("nan"))
        message = ""
        try:
            on_two(tmp_path, ours).test(module, VitData(), verbose=False)
        except QuantizationError as error:
            message = str(error)
        return message, is_quantized(module)

    one, other = on_ranks(2, job)
    broken, waiting = sorted([one[0], other[0]])
    assert "pixels of a calibration batch are NaN or infinite" in broken
    assert waiting == "1 other ranks could not draw their calibration images: see their errors."
    assert not one[1]
    assert not other[1]


# -- workers -----------------------------------------------------------------------------------------------------------


class Dying(Dataset[Any]):
    """Its worker is gone at the item of a number, once another file is there; a second time it stays."""

    def __init__(self, inner: Any, number: int, file: Path, after: Path | None = None) -> None:
        self.inner, self.number, self.file, self.after = inner, number, file, after

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        if index == self.number and not self.file.exists():
            while self.after is not None and not self.after.exists():
                time.sleep(0.01)
            self.file.touch()
            os._exit(1)
        return self.inner[index]


def dying(inner: Any, number: int, folder: Path, after: Path | None = None) -> Any:
    return DataLoader(Dying(inner, number, folder / "died", after), batch_size=8, num_workers=1)


def test_a_training_whose_worker_dies_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def fitted(folder: Path, number: int, epochs: int = 2, **resume: Any) -> SmallNet:
        torch.manual_seed(0)
        keep = ModelCheckpoint(folder, save_last=True)
        options = {"default_root_dir": folder, "max_epochs": epochs, "enable_checkpointing": True}
        module = SmallNet()
        run = trainer(quantization(quantizer_lr=1e-3), keep, **options)
        run.fit(module, dying(Images(), number, folder), module.val_dataloader(), **resume)
        return module

    straight = fitted(tmp_path / "straight", number=-1)
    folder = tmp_path / "died"
    fitted(folder, number=-1, epochs=1)
    with pytest.raises(DIED, match=WORKER_DIED):
        fitted(folder, number=20, ckpt_path=folder / "last.ckpt", weights_only=True)
    found = fitted(folder, number=20, ckpt_path=folder / "last.ckpt", weights_only=True)
    expected = straight.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def test_a_calibration_whose_worker_dies_leaves_the_network_in_float(tmp_path: Path) -> None:
    module = VitModule()
    data = dying(Dicts(images(8, seed=4), torch.arange(8)), 3, tmp_path)
    ours = IGQViT(groups=4, calibration_images=8, allocate=False, calibration_data=data)
    with pytest.raises(DIED, match=WORKER_DIED):
        quiet(tmp_path, ours).test(module, VitData(), verbose=False)
    assert not is_quantized(module)
    quiet(tmp_path, ours).test(module, VitData(), verbose=False)
    assert is_calibrated(module)


class Mark(pl.Callback):
    """Leaves a file when the callbacks before it have begun the test."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.file.touch()


def test_a_test_whose_worker_dies_does_not_calibrate_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = PROJECTS["accuquant"]
    noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    # A worker starts before the calibration does, and its death stops whatever goes on.
    calibrated = tmp_path / "calibrated"
    data = dying(noise, 3, tmp_path, after=calibrated)
    with pytest.raises(DIED, match=WORKER_DIED):
        project.trainer(tmp_path, project.callback(), Mark(calibrated)).test(project.module(), data, verbose=False)
    assert list((tmp_path / "accuquant").glob("*.safetensors"))
    caplog.clear()
    module = project.module()
    project.trainer(tmp_path, project.callback()).test(module, data, verbose=False)
    assert "Calibration of the same weights, data and settings" in caplog.text
    assert is_calibrated(module)
