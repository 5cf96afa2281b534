"""Several gloo processes calibrate as one does on all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.processes import on_ranks
from helpers.vits import VitData, VitModule, calibration, finished, images, quiet, swin, vit
from lightning_quant import DigitsDataModule, IGQViT, IGQViTModule
from lightning_quant.igq_vit.preparation import images_hash
from lightning_quant.igq_vit.ranges import gram_matrix, layer_wise_range, tail_bounds
from lightning_quant.utilities.distributed import gather


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """A forked child that uses OpenMP after its parent did would wait for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def share(rank: int, ranks: int, count: int, *size: int) -> Tensor:
    return images(count, *size)[rank::ranks]


def calibrated_vit(rank: int, ranks: int) -> dict[str, list[float]]:
    found = calibration(vit(), share(rank, ranks, 8), calibration_images=8)
    state = finished(found).state_dict()
    return {key: value.double().flatten().tolist() for key, value in state.items()}


def calibrated_swin(rank: int, ranks: int) -> dict[str, list[float]]:
    settings: dict[str, Any] = {"calibration_images": 5, "allocate": False}
    found = calibration(swin(), share(rank, ranks, 5, 16, 3), **settings)
    state = finished(found).state_dict()
    return {key: value.double().flatten().tolist() for key, value in state.items()}


@pytest.mark.parametrize(("ranks", "job"), [(2, calibrated_vit), (3, calibrated_vit), (2, calibrated_swin)])
def test_ranks_find_what_one_process_finds(ranks: int, job: Any) -> None:
    alone = job(0, 1)
    first, *others = on_ranks(ranks, job)
    assert all(other == first for other in others)
    assert first.keys() == alone.keys()
    for key, values in alone.items():
        if key.startswith("groups"):
            assert first[key] == values, key
        else:
            assert first[key] == pytest.approx(values, rel=1e-5, abs=1e-9), key


def fitted(devices: int, folder: Path) -> dict[str, list[float]]:
    """The state that a fit of the module leaves on disk."""
    settings = IGQViT(groups=4, calibration_images=7, cache_dir=str(folder))
    strategy = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    module = IGQViTModule(vit(), 10, quantization=settings)
    quiet(folder, limit_val_batches=1, **strategy).fit(module, DigitsDataModule(64))
    return state_in(folder)


def state_in(folder: Path) -> dict[str, list[float]]:
    (path,) = folder.glob("*.safetensors")
    return {key: value.double().flatten().tolist() for key, value in load_file(path).items()}


def evaluated(devices: int, folder: Path) -> dict[str, list[float]]:
    """The state that a test of somebody's module leaves on disk."""
    callback = IGQViT(groups=4, calibration_images=7, cache_dir=str(folder))
    strategy = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    quiet(folder, callback, **strategy).test(VitModule(), VitData())
    return state_in(folder)


@pytest.mark.parametrize("run", [fitted, evaluated])
def test_on_two_devices_the_calibration_is_that_on_one(run: Any, tmp_path: Path) -> None:
    alone, both = run(1, tmp_path / "one"), run(2, tmp_path / "two")
    assert any(key.startswith("groups") for key in alone)
    assert both.keys() == alone.keys()
    for key, values in alone.items():
        assert both[key] == pytest.approx(values, rel=1e-5, abs=1e-9), key


def hashes(rank: int, ranks: int) -> str:
    return images_hash(share(rank, ranks, 7), torch.device("cpu"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_images_are_known_again_however_they_are_divided(ranks: int) -> None:
    assert set(on_ranks(ranks, hashes)) == {hashes(0, 1)}
    assert images_hash(images(6), torch.device("cpu")) != images_hash(images(7), torch.device("cpu"))


def statistics(rank: int, ranks: int) -> list[list[float]]:
    x = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)).pow(3)
    own = x[rank::ranks]
    low, high = layer_wise_range(own, 4, (0.0, 1.0, 5.0), len(own))
    parts = [tail_bounds(own, (0.0, 2.0, 10.0)), gram_matrix(own), torch.stack([low, high]), gather(own).sum(0)]
    return [part.double().flatten().tolist() for part in parts]


@pytest.mark.parametrize("ranks", [2, 3])
def test_statistics_are_those_of_the_union(ranks: int) -> None:
    alone = statistics(0, 1)
    for found in on_ranks(ranks, statistics):
        for values, expected in zip(found, alone, strict=True):
            assert values == pytest.approx(expected, rel=1e-5)
