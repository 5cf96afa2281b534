"""A callback of somebody else's that calibrates: what the base class does for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch

from helpers.networks import SmallNet
from helpers.networks import trainer as quiet
from helpers.walk import TOTAL, Walk
from lightning_quant.calibration.callback import CalibratingCallback
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.calibration.record import STEPS
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import QuantizationError
from lightning_quant.nn import strip, swap
from lightning_quant.nn.structure import is_quantized
from lightning_quant.quantizers import FixedQuantizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Walker(CalibratingCallback):
    """Calibrates the last layer."""

    callback_name: ClassVar[str] = "Walker"

    def __init__(self, fails_at: int = TOTAL) -> None:
        super().__init__()
        self.fails_at, self.checked = fails_at, 0

    def check(self, pl_module: pl.LightningModule) -> None:
        self.checked += 1

    def start_calibration(self, trainer: pl.Trainer, pl_module: Any) -> Walk:
        return Walk(swap(pl_module.net[-1], weight_quantizer=FixedQuantizer(4)))

    def state_file(self, trainer: pl.Trainer, calibration: Any) -> StateFile:
        return StateFile(trainer, None, "walker", "settings")

    def units(self, calibration: Any) -> int:
        if self.fails_at < TOTAL:
            step = calibration.step

            def stops(advance: Any) -> str:
                if calibration.taken == self.fails_at:
                    raise QuantizationError("no further")
                return str(step(advance))

            calibration.step = stops
        return super().units(calibration)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_what_is_evaluated_is_calibrated_once_and_fit_is_float(verb: str, tmp_path: Path) -> None:
    module, ours = SmallNet(), Walker()
    run = quiet(ours, default_root_dir=tmp_path)
    assert ours.record == {}
    getattr(run, verb)(module)
    first = ours.calibration
    assert isinstance(first, Walk)
    assert first.calls == list(range(TOTAL))
    assert ours.record[STEPS].tolist() == [TOTAL, TOTAL]
    getattr(run, verb)(module)
    assert ours.calibration is first
    assert is_calibrated(module)
    run.fit(module)
    assert not is_quantized(module)
    assert ours.calibration is None
    assert ours.record == {}


def test_what_stops_in_between_is_float_again_and_goes_on_from_its_file(tmp_path: Path) -> None:
    module = SmallNet()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(QuantizationError, match="no further"):
        quiet(Walker(fails_at=4), default_root_dir=tmp_path).test(module)
    assert not is_quantized(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    ours = Walker()
    quiet(ours, default_root_dir=tmp_path).test(module)
    assert isinstance(ours.calibration, Walk)
    assert ours.calibration.calls == [4, 5]


def test_a_checkpoint_brings_the_record_of_its_own_run(tmp_path: Path) -> None:
    module, ours = SmallNet(), Walker()
    run = quiet(ours, default_root_dir=tmp_path / "one")
    run.test(module)
    run.save_checkpoint(tmp_path / "kept.ckpt")
    other = Walker()
    end = quiet(other, default_root_dir=tmp_path / "two")
    end.test(SmallNet(), ckpt_path=tmp_path / "kept.ckpt")
    assert other.calibration is None
    assert other.record[STEPS].tolist() == [TOTAL, TOTAL]
    # Another checkpoint, without a record, takes it away.
    plain = SmallNet()
    swap(plain.net[-1], weight_quantizer=FixedQuantizer(4)).weight_quantizer.initialize(torch.ones(2))  # type: ignore[arg-type,operator,union-attr]
    bare = quiet(default_root_dir=tmp_path)
    bare.strategy.connect(plain)
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    end.test(SmallNet(), ckpt_path=tmp_path / "bare.ckpt")
    assert other.record == {}


def test_a_record_is_of_the_network_that_was_calibrated(tmp_path: Path) -> None:
    ours, other = Walker(), Walker()
    module = SmallNet()
    run = quiet(ours, default_root_dir=tmp_path / "one")
    run.test(module)
    # Another network, calibrated by somebody else to other ranges.
    second = SmallNet()
    quiet(other, default_root_dir=tmp_path / "two").test(second)
    second.net[-1].weight_quantizer.initialize(torch.full((2, 2), 9.0))  # type: ignore[operator,union-attr]
    run.test(second)
    assert ours.calibration is None
    assert ours.record == {}


def test_a_checkpoint_without_callbacks_takes_the_record_away(tmp_path: Path) -> None:
    ours = Walker()
    run = quiet(ours, default_root_dir=tmp_path)
    module = SmallNet()
    run.test(module)
    module.net[-1].weight_quantizer.initialize(torch.full((2, 2), 9.0))  # type: ignore[operator,union-attr]
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    again = quiet(ours, default_root_dir=tmp_path)
    again.test(SmallNet(), ckpt_path=tmp_path / "weights.ckpt")
    assert ours.record == {}


def test_a_network_in_float_again_is_saved_without_a_record(tmp_path: Path) -> None:
    ours, module = Walker(), SmallNet()
    run = quiet(ours, default_root_dir=tmp_path)
    run.test(module)
    run.save_checkpoint(tmp_path / "quantized.ckpt")
    strip(module)
    run.save_checkpoint(tmp_path / "float.ckpt")
    held = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"] for name in ("quantized", "float")]
    assert [ours.state_key in each for each in held] == [True, False]


def test_one_that_does_not_say_what_it_does_is_told(tmp_path: Path) -> None:
    class Silent(CalibratingCallback):
        callback_name = "Silent"

    with pytest.raises(NotImplementedError, match="Silent does not implement start_calibration"):
        quiet(Silent(), default_root_dir=tmp_path).test(SmallNet())
