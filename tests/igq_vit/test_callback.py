"""IGQViT beside somebody else's module: evaluated means calibrated first."""

from __future__ import annotations

import operator
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.vits import VitData, VitModule, images, quiet
from lightning_quant import (
    IGQViT,
    QuantizationError,
    SaveQuantized,
    load_from_checkpoint,
    load_quantized,
    strip,
)
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from lightning_quant.igq_vit.calibration import Calibration
from lightning_quant.nn.structure import quantizers_of


def igq(**kwargs: Any) -> IGQViT:
    return IGQViT(**({"groups": 4, "calibration_images": 8, "allocate": False} | kwargs))


def outputs(module: VitModule) -> Tensor:
    logits = torch.cat(module.seen)
    module.seen.clear()
    return logits


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps of all calibrations."""
    counts: Counter[str] = Counter()
    step = Calibration.step

    def counted(self: Calibration, *args: Any) -> str:
        counts["steps"] += 1
        return step(self, *args)

    monkeypatch.setattr(Calibration, "step", counted)
    return counts


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_evaluation_calibrates_first(verb: str, tmp_path: Path) -> None:
    module, callback = VitModule(), igq()
    getattr(quiet(tmp_path, callback), verb)(module, VitData())
    assert is_calibrated(module)
    assert callback.calibration is not None
    assert callback.calibration.finished
    # Usable outside the Trainer's inference mode.
    module(images(2)).sum().backward()


def test_the_test_is_of_the_quantized_network(tmp_path: Path) -> None:
    module, data = VitModule(), VitData()
    quiet(tmp_path).test(module, data)
    in_float = outputs(module)
    quiet(tmp_path, igq(weight_bits=2, activation_bits=2)).test(module, data)
    assert (outputs(module) - in_float).abs().max() > 0.1
    strip(module)
    quiet(tmp_path).test(module, data)
    assert torch.equal(outputs(module), in_float)


def test_fit_stays_in_float_and_the_next_test_calibrates_anew(tmp_path: Path, steps: Counter[str]) -> None:
    module, data, callback = VitModule(), VitData(), igq()
    quiet(tmp_path, callback).test(module, data)
    assert steps["steps"] == 1
    weights = [type(layer) for layer in module.modules()]
    trainer = quiet(tmp_path, callback, num_sanity_val_steps=1)
    trainer.fit(module, data)
    assert not is_calibrated(module)
    assert [type(layer) for layer in module.modules()] != weights
    assert steps["steps"] == 1
    trainer.test(module, data)
    assert steps["steps"] == 2


def test_calibrated_once_it_is_not_calibrated_again(tmp_path: Path, steps: Counter[str]) -> None:
    module, data, callback = VitModule(), VitData(), igq()
    quiet(tmp_path, callback).test(module, data)
    first = outputs(module)
    quiet(tmp_path, callback).test(module, data)
    assert steps["steps"] == 1
    assert torch.equal(outputs(module), first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 6}, "weight_bits=4, and the callback says weight_bits=6"),
        ({"activation_bits": 8}, "activation_bits=4, and the callback says activation_bits=8"),
        ({"groups": 2}, "groups=4, and the callback says groups=2"),
        ({"softmax_groups": 2}, "softmax_groups=4, and the callback says softmax_groups=2"),
        ({"scheme": "layer_wise"}, "scheme='igq', and the callback says scheme='layer_wise'"),
    ],
)
def test_calibrated_otherwise_it_is_refused_until_stripped(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module, data = VitModule(), VitData()
    quiet(tmp_path, igq()).test(module, data)
    with pytest.raises(QuantizationError, match=f"already quantized, with {message}: call lightning_quant.strip"):
        quiet(tmp_path, igq(**settings)).test(module, data)
    strip(module)
    quiet(tmp_path, igq(**settings)).test(module, data)
    assert is_calibrated(module)


@pytest.mark.parametrize("scheme", ["igq", "layer_wise", "per_token", "repq", "upper_bound"])
def test_each_scheme_recognises_its_own(scheme: str, tmp_path: Path, steps: Counter[str]) -> None:
    module = VitModule()
    for bits in ({"activation_bits": 8}, {"weight_bits": 8, "activation_bits": 6}):
        quiet(tmp_path, igq(scheme=scheme, **bits)).validate(module, VitData())
        quiet(tmp_path, igq(scheme=scheme, **bits)).test(module, VitData())
        strip(module)
    assert steps["steps"] == 2


def test_a_finished_calibration_is_taken_from_the_cache(tmp_path: Path, steps: Counter[str]) -> None:
    first, second = VitModule(), VitModule()
    quiet(tmp_path, igq(allocate=True)).test(first, VitData())
    done = steps["steps"]
    assert done == 13
    quiet(tmp_path, igq(allocate=True)).test(second, VitData())
    assert steps["steps"] == done
    assert torch.equal(outputs(first), outputs(second))
    quiet(tmp_path, igq(allocate=True, seed=1)).test(VitModule(), VitData())
    assert steps["steps"] == 2 * done


def test_killed_in_the_middle_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, broken = VitModule(), VitModule()
    quiet(tmp_path / "a", igq(allocate=True)).test(straight, VitData())
    step, counts = Calibration.step, Counter[str]()

    def dies(self: Calibration, *args: Any) -> str:
        counts["steps"] += 1
        if counts["steps"] == 6:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Calibration, "step", dies)
    with pytest.raises(SystemExit):
        quiet(tmp_path / "b", igq(allocate=True)).test(broken, VitData())
    again = VitModule()
    quiet(tmp_path / "b", igq(allocate=True)).test(again, VitData())
    assert counts["steps"] == 5 + 1 + 8
    expected = outputs(straight)
    assert torch.equal(outputs(again), expected)
    # In a notebook the same module is there still.
    quiet(tmp_path / "b", igq(allocate=True)).test(broken, VitData())
    assert torch.equal(outputs(broken), expected)


@pytest.mark.parametrize("dies_at", [1, 3])
def test_a_calibration_that_fails_leaves_the_float_module(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, callback = VitModule(), igq(allocate=True)
    calls, before = Counter[str](), module.eval()(images(2)).detach()

    def fails(*args: Any) -> Tensor:
        calls["posteriors"] += 1
        if calls["posteriors"] == dies_at:
            raise ValueError("of the user's code")
        return torch.zeros(2, 2).log_softmax(1).double()

    monkeypatch.setattr(callback, "log_posteriors", fails)
    with pytest.raises(ValueError, match="of the user's code"):
        quiet(tmp_path, callback).test(module, VitData())
    assert not is_calibrated(module)
    assert torch.equal(module.eval()(images(2)), before)


def test_buffers_and_precision_are_part_of_what_was_calibrated(tmp_path: Path, steps: Counter[str]) -> None:
    def run(shift: float, **kwargs: Any) -> None:
        module = VitModule()
        module.register_buffer("shift", torch.tensor(shift))
        quiet(tmp_path, igq(), **kwargs).test(module, VitData())

    for count, (shift, precision) in enumerate([(0.0, "32-true"), (1.0, "32-true"), (0.0, "bf16-mixed")], start=1):
        for _ in range(2):
            run(shift, precision=precision)
            assert steps["steps"] == count


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_in_any_precision_ranges_are_fp32(precision: Any, tmp_path: Path) -> None:
    module = VitModule()
    (result,) = quiet(tmp_path, igq(), precision=precision).test(module, VitData())
    assert result["test/loss"] < 10
    ranges = [buffer for _, quantizer in quantizers_of(module) for buffer in quantizer.buffers()]
    assert {buffer.dtype for buffer in ranges} == {torch.float32}
    in_fp32 = VitModule()
    quiet(tmp_path, igq()).test(in_fp32, VitData())
    first, second = (found.backbone.blocks[0].attn.qkv.input_quantizer.scale for found in (module, in_fp32))  # type: ignore[union-attr,index]
    assert torch.allclose(first, second, rtol=0.1)


def test_fit_and_then_the_best_checkpoint_twice(tmp_path: Path, steps: Counter[str]) -> None:
    module, data = VitModule(), VitData()
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer = quiet(tmp_path, igq(), best, enable_checkpointing=True, enable_model_summary=False)
    trainer.fit(module, data)
    trainer.test(module, data, ckpt_path="best")
    first = outputs(module)
    trainer.test(module, data, ckpt_path="best")
    assert torch.equal(outputs(module), first)
    assert steps["steps"] == 1


def test_a_damaged_cache_says_what_to_delete(tmp_path: Path) -> None:
    quiet(tmp_path, igq()).test(VitModule(), VitData())
    (path,) = (tmp_path / "igq_vit").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged .*: delete it"):
        quiet(tmp_path, igq()).test(VitModule(), VitData())


def test_checkpoints_of_a_quantized_and_of_a_float_module(tmp_path: Path, steps: Counter[str]) -> None:
    module, data = VitModule(), VitData()
    trainer = quiet(tmp_path, igq())
    trainer.test(module, data)
    quantized = outputs(module)
    trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    fresh = VitModule()
    with torch.no_grad():
        fresh.backbone.head.weight.zero_()  # type: ignore[union-attr,operator]
    quiet(tmp_path, igq()).test(fresh, data, ckpt_path=str(tmp_path / "quantized.ckpt"))
    assert steps["steps"] == 1
    assert torch.equal(outputs(fresh), quantized)
    alone = load_from_checkpoint(VitModule, tmp_path / "quantized.ckpt").eval()
    assert torch.equal(torch.cat([alone(batch["image"]) for batch in data.test_dataloader()]), quantized)
    with pytest.raises(RuntimeError, match="add IGQViT to the Trainer's callbacks"):
        quiet(tmp_path).test(VitModule(), data, ckpt_path=str(tmp_path / "quantized.ckpt"))
    strip(module)
    in_float = quiet(tmp_path)
    in_float.test(module, data, verbose=False)
    in_float.save_checkpoint(tmp_path / "float.ckpt")
    quiet(tmp_path / "other", igq()).test(fresh, data, ckpt_path=str(tmp_path / "float.ckpt"))
    assert steps["steps"] == 2
    assert torch.equal(outputs(fresh), quantized)


def test_saved_as_a_folder_and_loaded_it_gives_the_same_bits(tmp_path: Path) -> None:
    module, data = VitModule(), VitData()
    quiet(tmp_path, igq(), SaveQuantized(str(tmp_path / "saved"))).test(module, data)
    loaded = load_quantized(tmp_path / "saved", model=VitModule())
    assert torch.equal(loaded(images(5, seed=8)), module.eval()(images(5, seed=8)))


def test_loaders_alone_are_enough_but_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="calibration images are taken from the evaluation data"):
        quiet(tmp_path, igq()).test(VitModule(), dataloaders=VitData().test_dataloader())


def test_images_can_be_given(tmp_path: Path) -> None:
    callback = igq(calibration_data=images(8, seed=1))
    first, second = VitModule(), VitModule()
    quiet(tmp_path / "a", callback).test(first, VitData())
    quiet(tmp_path / "b", igq(calibration_data=images(8, seed=1) * 3)).test(second, VitData())
    assert not torch.equal(outputs(first), outputs(second))


def test_fewer_images_than_asked_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Requested 64 calibration images, but found 16"):
        quiet(tmp_path, igq(calibration_images=64)).test(VitModule(), VitData())


def test_networks_that_cannot_be_are_refused_before_anything_starts(tmp_path: Path) -> None:
    class OddAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x

    module = VitModule()
    module.extra = OddAttention()
    with pytest.raises(
        UnsupportedModelError, match=r"extra is a .*OddAttention, an attention class that is not registered"
    ):
        quiet(tmp_path, igq()).test(module, VitData())
    module = VitModule()
    module.backbone = nn.Linear(8, 8)
    with pytest.raises(UnsupportedModelError, match="VitModule has no attention"):
        quiet(tmp_path, igq()).test(module, VitData())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_of_the_user_does_not_matter(batch_size: int, tmp_path: Path) -> None:
    first, second = VitModule(), VitModule()
    quiet(tmp_path / "a", igq()).test(first, VitData())
    quiet(tmp_path / "b", igq()).test(second, VitData(batch_size=batch_size))
    assert torch.allclose(outputs(first), outputs(second), atol=1e-5)


def test_nan_in_the_images_is_refused(tmp_path: Path) -> None:
    bad = images(8)
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="1 of 512 pixels of a calibration batch are NaN"):
        quiet(tmp_path, igq(calibration_data=bad)).test(VitModule(), VitData())


def test_arguments_are_checked_when_given() -> None:
    with pytest.raises(ConfigurationError, match="group_ranges='wide': expected one of 'mean'"):
        igq(group_ranges="wide")


def test_what_a_user_reads_first_is_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        quiet(tmp_path, igq(allocate=True)).test(VitModule(), VitData())
    text = caplog.text
    assert "backbone.blocks.1.attn" in text
    assert "Q, K, V 4 bit layer-wise; softmax 4 bit, rows in 4 groups" in text
    assert "backbone.head" in text
    assert "layer-wise (one token)" in text
    assert "forward passes" in text
    assert "Groups of channels:" in text
    assert "% relative to layer-wise" in text


class Normalizing(VitModule):
    """Its batches become images in Lightning's hook, and its step takes the second of a tuple."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0], (batch[1] - 100.0) / 25

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step({"image": batch[1], "label": batch[0]}, batch_idx)


def pixels(count: int = 16, seed: int = 1) -> TensorDataset:
    return TensorDataset(torch.arange(count) % 10, images(count, seed=seed) * 25 + 100)


class Pixels(VitData):
    def loader(self, count: int, seed: int) -> DataLoader[Any]:
        return DataLoader(pixels(count, seed), batch_size=self.batch_size)


def second(batch: Any) -> Tensor:
    found: Tensor = batch[1]
    return found


@pytest.mark.parametrize(
    "kwargs",
    [
        {"calibration_data": pixels()},
        {"calibration_data": DataLoader(pixels(), batch_size=5)},
        {"images": second},
        {"calibration_data": images(16, seed=1)},
    ],
    ids=["data set", "loader", "function", "images as they are"],
)
def test_all_ways_to_the_same_images_give_the_same_network(kwargs: dict[str, Any], tmp_path: Path) -> None:
    first, other = Normalizing(), Normalizing()
    quiet(tmp_path / "a", igq()).test(first, Pixels())
    quiet(tmp_path / "b", igq(**kwargs)).test(other, Pixels())
    assert torch.allclose(outputs(other), outputs(first), atol=1e-4)


def test_data_that_the_hooks_cannot_take_are_told_with_the_hook(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Normalizing.on_after_batch_transfer, .* raised IndexError .*TENSOR"):
        quiet(tmp_path, igq(calibration_data=TensorDataset(images(16)))).test(Normalizing(), Pixels())


def test_a_network_that_the_step_calls_without_a_forward_is_calibrated(tmp_path: Path) -> None:
    class Direct(VitModule):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(self.backbone(batch["image"]).detach())

    first, other = VitModule(), Direct()
    quiet(tmp_path / "a", igq()).test(first, VitData())
    quiet(tmp_path / "b", igq()).test(other, VitData())
    assert torch.equal(outputs(other), outputs(first))


def test_of_several_images_of_an_item_the_first_counts(tmp_path: Path) -> None:
    class Clips(VitModule):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            clip = torch.stack([batch["image"], batch["image"] + 9], 1).flatten(0, 1)
            self.seen.append(self(clip)[::2].detach())

    first, other = VitModule(), Clips()
    quiet(tmp_path / "a", igq()).test(first, VitData())
    quiet(tmp_path / "b", igq()).test(other, VitData())
    assert torch.allclose(outputs(other), outputs(first), atol=1e-5)


def test_a_function_that_gives_no_images_is_told_what_it_gave(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"images=FUNCTION returned int64 \(4,\) for a tuple of int64 \(4,\), "
    ):
        quiet(tmp_path, igq(images=lambda batch: batch[0])).test(Normalizing(), Pixels())


def test_a_function_is_named_by_its_import_path_in_a_file() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(IGQViT, "callback")
    found = parser.parse_object(
        {"callback": {"class_path": "lightning_quant.IGQViT", "init_args": {"images": "operator.not_"}}}
    )
    assert parser.instantiate(found).callback.images is operator.not_
