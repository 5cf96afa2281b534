"""Files of calibrations: known again by what they depend on, whole or not there, damaged ones named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.networks import trainer as quiet
from lightning_quant.calibration import state_file as calibration_files
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import CheckpointError
from lightning_quant.nn import swap
from lightning_quant.nn.structure import weights_hash
from lightning_quant.quantizers import FixedQuantizer


class Count:
    """Counts its steps."""

    total = 3

    def __init__(self, done: int = 0) -> None:
        self.done = done

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def replay(self) -> None:
        """It has no data."""

    def step(self, advance: Callable[[str], None] = lambda name: None) -> str:
        self.done += 1
        return "counted"

    def record(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"done": torch.tensor([[self.done, 0], [0, 1]]).T}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.done = int(state["done"][0, 0])


class Choosy(Count):
    """Worth a file after the second step."""

    @property
    def worth_saving(self) -> bool:
        return self.done == 2


def file(folder: Path, *parts: object, active: bool = True, **kwargs: Any) -> StateFile:
    return StateFile(quiet(default_root_dir=folder, **kwargs), None, "count", *parts, active=active)


def loaded(found: StateFile) -> int:
    calibration = Count()
    found.load(calibration)
    return calibration.done


def test_what_was_written_is_read_and_what_was_not_is_left(tmp_path: Path) -> None:
    assert loaded(file(tmp_path)) == 0
    file(tmp_path).save(Count(2))
    assert loaded(file(tmp_path)) == 2
    file(tmp_path).save(Count(3))
    assert loaded(file(tmp_path)) == 3
    assert [path.name for path in (tmp_path / "count").iterdir()] == [file(tmp_path).path.name]


def test_each_part_and_the_precision_have_files_of_their_own(tmp_path: Path) -> None:
    file(tmp_path, "a", 1).save(Count(2))
    assert loaded(file(tmp_path, "a", 1)) == 2
    assert [loaded(file(tmp_path, *parts)) for parts in ((), ("a",), ("a", 2), ("a", "1"), (1, "a"))] == [0] * 5
    assert loaded(file(tmp_path, "a", 1, precision="bf16-mixed")) == 0


def test_a_folder_of_the_users_is_taken(tmp_path: Path) -> None:
    trainer = quiet(default_root_dir=tmp_path / "root")
    StateFile(trainer, tmp_path / "mine", "count").save(Count(1))
    assert loaded(StateFile(trainer, tmp_path / "mine", "count")) == 1
    assert not (tmp_path / "root").exists()


def test_only_what_is_worth_it_or_finished_is_written(tmp_path: Path) -> None:
    calibration, found = Choosy(), []
    while not calibration.finished:
        calibration.step()
        file(tmp_path).save(calibration)
        found.append(loaded(file(tmp_path)))
    assert found == [0, 2, 3]


def test_inactive_it_neither_reads_nor_writes(tmp_path: Path) -> None:
    file(tmp_path, active=False).save(Count(2))
    assert not (tmp_path / "count").exists()
    file(tmp_path).save(Count(2))
    assert loaded(file(tmp_path, active=False)) == 0


@pytest.mark.parametrize("kept", [0, 5, 70])
def test_a_damaged_file_is_named(kept: int, tmp_path: Path) -> None:
    path = file(tmp_path).path
    file(tmp_path).save(Count(2))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged \(.*\): delete it and calibrate again"):
        loaded(file(tmp_path))


def test_a_write_that_fails_leaves_the_file_before_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file(tmp_path).save(Count(1))

    def fails(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(calibration_files, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        file(tmp_path).save(Count(2))
    assert loaded(file(tmp_path)) == 1
    assert list((tmp_path / "count").iterdir()) == [file(tmp_path).path]


def test_weights_and_buffers_make_the_hash_and_quantizers_do_not() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    in_float = weights_hash(network)
    swap(network[0], weight_quantizer=FixedQuantizer(4, axis=0))
    network(torch.zeros(1, 1, 2, 2).requires_grad_(False))
    assert weights_hash(network.eval()) != in_float  # the batch norm has seen a batch
    seen = weights_hash(network)
    network[0].weight_quantizer.initialize(torch.ones(2, 1, 1, 1))  # type: ignore[operator,union-attr]
    assert weights_hash(network) == seen
    network[0].weight.data = network[0].weight.data.to(torch.bfloat16)
    assert weights_hash(network) != seen
