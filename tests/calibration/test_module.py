"""A module whose fit is a calibration: any calibration in steps, wherever it is stopped, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.networks import trainer as quiet
from helpers.walk import TOTAL, Walk
from lightning_quant.calibration.module import CalibratingModule, is_calibrated
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import CheckpointError, QuantizationError
from lightning_quant.nn import strip, swap
from lightning_quant.quantizers import FixedQuantizer


class Walking(CalibratingModule):
    """A frozen layer, calibrated without data."""

    calibration_key: ClassVar[str] = "walk"
    callback_name: ClassVar[str] = "Walk"
    own_batches: ClassVar[bool] = True

    calibration: Walk | None

    def __init__(self, end: int = TOTAL, folder: str | Path | None = None, kind: str = "walk") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2).requires_grad_(False)
        self.end, self.folder, self.kind = end, folder, kind
        self.after: list[int] = []

    def start_calibration(self) -> Walk:
        strip(self)
        swap(self.layer, weight_quantizer=FixedQuantizer(4, axis=0))
        return Walk(self.layer, self.end, self.kind)

    def state_file(self, calibration: Walk) -> StateFile | None:
        if self.folder is None:
            return None
        # Each rank has a disk of its own.
        return StateFile(self.trainer, Path(self.folder) / str(self.global_rank), "walk")

    def after_step(self, calibration: Walk) -> None:
        self.after.append(calibration.taken)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/sum", self(batch).sum())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/sum", self(batch).sum())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)  # type: ignore[no-any-return]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(4, 2), batch_size=2)  # type: ignore[arg-type]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class ForData(Walking):
    own_batches: ClassVar[bool] = False


class Data(pl.LightningDataModule):
    """Batches that its own hooks alone understand; it writes down which of its loaders were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def _loader(self, which: str) -> DataLoader[Any]:
        self.asked.append(which)
        return DataLoader([{"x": torch.full((2,), 3.0)}], batch_size=1)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch["x"] + 1}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"]


def walk(module: Walking) -> Walk:
    assert module.calibration is not None
    return module.calibration


def outcome(module: Walking) -> tuple[float, list[float]]:
    """The number it came to, and what the layer computes."""
    return float(walk(module).value), module(torch.ones(2)).tolist()


def fitted(folder: Path, *callbacks: pl.Callback, end: int = TOTAL, **kwargs: Any) -> Walking:
    module = Walking(end)
    quiet(*callbacks, default_root_dir=folder, **kwargs).fit(module)
    return module


def each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


# -- fit --------------------------------------------------------------------------------------------------------------


def test_a_fit_is_all_steps_whatever_max_epochs_says(tmp_path: Path) -> None:
    module = Walking()
    trainer = quiet(default_root_dir=tmp_path, max_epochs=7)
    trainer.fit(module)
    assert walk(module).calls == list(range(TOTAL))
    assert module.after == list(range(1, TOTAL + 1))
    assert trainer.global_step == TOTAL


@pytest.mark.parametrize("end", [TOTAL, 4])
def test_stopped_at_any_step_and_resumed_it_ends_as_without_a_stop(end: int, tmp_path: Path) -> None:
    straight = fitted(tmp_path, each_step(tmp_path), end=end, enable_checkpointing=True)
    assert sorted(path.stem for path in tmp_path.glob("*.ckpt")) == [f"step={n}" for n in range(1, end + 1)]
    for stop in range(1, end + 1):
        module = Walking(end)
        trainer = quiet(default_root_dir=tmp_path)
        trainer.fit(module, ckpt_path=str(tmp_path / f"step={stop}.ckpt"))
        assert walk(module).calls == list(range(stop, end))
        assert outcome(module) == outcome(straight)


@pytest.mark.parametrize("name", ["epoch", "after"])
def test_stopped_by_limits_it_goes_on_from_the_end_of_the_epoch_and_from_after_the_fit(
    name: str, tmp_path: Path
) -> None:
    straight, path = fitted(tmp_path), None
    for round_, (stop, calls) in enumerate([(2, [0, 1]), (5, [2, 3, 4]), (-1, [5])]):
        module = Walking()
        ends = ModelCheckpoint(tmp_path, filename=f"epoch {round_}", save_on_train_epoch_end=True)
        trainer = quiet(ends, default_root_dir=tmp_path, max_steps=stop, enable_checkpointing=True)
        trainer.fit(module, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"after {round_}.ckpt")
        path = str(tmp_path / f"{name} {round_}.ckpt")
        assert walk(module).calls == calls
    assert outcome(module) == outcome(straight)
    assert trainer.global_step == TOTAL


def test_the_same_trainer_fits_twice(tmp_path: Path) -> None:
    trainer = quiet(default_root_dir=tmp_path)
    for _ in range(2):
        module = Walking()
        trainer.fit(module)
        assert walk(module).calls == list(range(TOTAL))


@pytest.mark.parametrize("end", [1, 4])
def test_what_ends_early_ends_the_fit(end: int, tmp_path: Path) -> None:
    module = Walking(end)
    last = ModelCheckpoint(tmp_path, filename="last")
    trainer = quiet(last, default_root_dir=tmp_path, enable_checkpointing=True)
    trainer.fit(module)
    assert trainer.global_step == end
    assert walk(module).finished
    loaded = Walking.load_from_checkpoint(tmp_path / "last.ckpt")
    trainer.test(loaded, verbose=False)
    assert loaded(torch.ones(2)).tolist() == module(torch.ones(2)).tolist()


def test_what_is_left_goes_on_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, module, step = fitted(tmp_path), Walking(folder=tmp_path / "states"), Walk.step

    def interrupted(self: Walk, advance: Callable[[str], None] = lambda name: None) -> str:
        if self.taken == 5:
            raise KeyboardInterrupt
        return step(self, advance)

    monkeypatch.setattr(Walk, "step", interrupted)
    with pytest.raises(SystemExit):
        quiet(default_root_dir=tmp_path).fit(module)
    assert walk(module).calls == [0, 1, 2, 3, 4]
    monkeypatch.setattr(Walk, "step", step)
    quiet(default_root_dir=tmp_path).fit(module)
    # After the fourth step it was worth writing, after the fifth not.
    assert walk(module).calls == [4, 5]
    assert outcome(module) == outcome(straight)


def test_what_the_file_has_finished_is_not_done_again_and_a_checkpoint_is_written(tmp_path: Path) -> None:
    for name, calls in (("first", list(range(TOTAL))), ("second", [])):
        module = Walking(folder=tmp_path / "states")
        last = ModelCheckpoint(tmp_path, filename=name)
        quiet(last, default_root_dir=tmp_path, enable_checkpointing=True).fit(module)
        assert walk(module).calls == calls
    first, second = (Walking.load_from_checkpoint(tmp_path / f"{name}.ckpt") for name in ("first", "second"))
    assert first(torch.ones(2)).tolist() == second(torch.ones(2)).tolist()


def test_a_checkpoint_of_another_calibration_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, each_step(tmp_path), enable_checkpointing=True)
    with pytest.raises(CheckpointError, match="was another"):
        quiet(default_root_dir=tmp_path).fit(Walking(kind="run"), ckpt_path=str(tmp_path / "step=2.ckpt"))


# -- precision and parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_precision_of_the_trainer_does_not_reach_into_a_step(precision: Any, tmp_path: Path) -> None:
    found = fitted(tmp_path, precision=precision)
    assert walk(found).value.dtype == torch.float32
    assert float(walk(found).value) == float(walk(fitted(tmp_path)).value)


def test_with_a_scaler_of_fp16_steps_are_counted_too(tmp_path: Path) -> None:
    trainer = quiet(default_root_dir=tmp_path, plugins=[MixedPrecision("16-mixed", "cpu")])
    trainer.fit(Walking())
    assert trainer.global_step == TOTAL


def test_the_module_is_left_with_the_parameters_it_had(tmp_path: Path) -> None:
    expected = {name: value.clone() for name, value in Walking().named_parameters()}
    module = fitted(tmp_path, each_step(tmp_path), enable_checkpointing=True)
    assert {name: value.tolist() for name, value in module.named_parameters()} == {
        name: value.tolist() for name, value in expected.items()
    }
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if name in expected or name.startswith("anchor")} == set(expected)


# -- ranks -------------------------------------------------------------------------------------------------------------


class Noting(pl.Callback):
    """Each rank writes down what it did, and what came out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Walking)
        note = [walk(pl_module).calls, *outcome(pl_module)]
        (self.folder / f"rank {trainer.global_rank}.json").write_text(json.dumps(note), encoding="utf-8")


def on_two_ranks(folder: Path, module: Walking, **kwargs: Any) -> list[Any]:
    torch.set_num_threads(1)
    quiet(Noting(folder), default_root_dir=folder, strategy="ddp_fork", devices=2, **kwargs).fit(module)
    return [json.loads((folder / f"rank {rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def test_two_ranks_do_every_step_each(tmp_path: Path) -> None:
    found = on_two_ranks(tmp_path, Walking())
    assert found == [[list(range(TOTAL)), *outcome(fitted(tmp_path))]] * 2


def test_ranks_that_do_not_see_the_file_take_it_from_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    assert [calls for calls, *_ in on_two_ranks(tmp_path, Walking(folder=folder), max_steps=4)] == [[0, 1, 2, 3]] * 2
    assert not (folder / "1").exists()
    found = on_two_ranks(tmp_path, Walking(folder=folder))
    assert found == [[[4, 5], *outcome(fitted(tmp_path))]] * 2


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_what_is_not_calibrated_or_only_in_part_is_refused(verb: str, tmp_path: Path) -> None:
    trainer = quiet(default_root_dir=tmp_path)
    with pytest.raises(QuantizationError, match=r"not calibrated: call trainer.fit\(module\) first"):
        getattr(trainer, verb)(Walking())
    with pytest.raises(QuantizationError, match=r"not calibrated: call trainer.fit\(module, datamodule\) first"):
        getattr(trainer, verb)(ForData())
    module = fitted(tmp_path, max_steps=2)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    assert is_calibrated(module)
    in_part = r"stopped after step 2 of 6, .*: continue with trainer.fit\(module, ckpt_path=...\)"
    with pytest.raises(QuantizationError, match=in_part):
        getattr(trainer, verb)(module)
    with pytest.raises(QuantizationError, match=in_part):
        getattr(trainer, verb)(Walking(), ckpt_path=str(tmp_path / "part.ckpt"))
    quiet(default_root_dir=tmp_path).fit(module, ckpt_path=str(tmp_path / "part.ckpt"))
    getattr(trainer, verb)(module)
    # Of the checkpoint, not of the calibration that the module has finished.
    with pytest.raises(QuantizationError, match=in_part):
        getattr(trainer, verb)(module, ckpt_path=str(tmp_path / "part.ckpt"))


def test_validation_within_the_fit_is_let_through(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watching(Walking):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            seen.append(float(self(batch).sum()))

    module = Watching()
    quiet(default_root_dir=tmp_path, num_sanity_val_steps=1).fit(module)
    in_float = Walking()(torch.ones(2, 2)).sum()
    assert seen == [float(in_float)] + [float(module(torch.ones(2, 2)).sum())] * 2


def test_a_datamodule_gives_the_batches_of_evaluations_only(tmp_path: Path) -> None:
    module, data = ForData(), Data()
    trainer = quiet(default_root_dir=tmp_path)
    trainer.fit(module, data)
    assert walk(module).calls == list(range(TOTAL))
    (found,) = trainer.predict(module, data)  # type: ignore[misc]
    assert data.asked == ["val", "predict"]
    assert torch.equal(found, module(torch.full((1, 2), 4.0)))  # type: ignore[arg-type]


def test_own_batches_are_taken_whatever_datamodule_there_is(tmp_path: Path) -> None:
    module, data = Walking(), Data()
    trainer = quiet(default_root_dir=tmp_path)
    trainer.fit(module, data)
    first, second = trainer.predict(module, data)  # type: ignore[misc]
    assert torch.equal(first, module(torch.ones(2, 2)))  # type: ignore[arg-type]
    assert torch.equal(first, second)  # type: ignore[arg-type]
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    assert data.asked == []
    (given,) = trainer.predict(module, DataLoader([torch.full((2,), 5.0)]))  # type: ignore[misc,arg-type]
    assert torch.equal(given, module(torch.full((1, 2), 5.0)))  # type: ignore[arg-type]


def test_a_subclass_that_does_not_say_how_is_told(tmp_path: Path) -> None:
    class Nothing(CalibratingModule):
        pass

    with pytest.raises(NotImplementedError, match="Nothing does not implement start_calibration"):
        quiet(default_root_dir=tmp_path).fit(Nothing())
