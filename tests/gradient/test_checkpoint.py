from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.networks import SmallNet, fitted, quantization, trainer
from lightning_quant import GradientQuantization, ImageClassifier, load_from_checkpoint
from lightning_quant.errors import CheckpointError
from lightning_quant.gradient import IntervalStrategy, LargeGradientInterval, MinimumErrorInterval
from lightning_quant.quantizers import LearnedQuantizer


def saved(folder: Path, **kwargs: Any) -> Path:
    """A checkpoint for each epoch of a short training; the path of the second."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fitted(quantization(**kwargs), keep, enable_checkpointing=True, max_epochs=4)
    return folder / "epoch=1.ckpt"


@pytest.mark.parametrize("interval", [LargeGradientInterval(0.1), MinimumErrorInterval(every=4)])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, interval: IntervalStrategy) -> None:
    path = saved(tmp_path, interval=interval, quantizer_lr=1e-3)
    pl.seed_everything(99, verbose=False)
    keep = ModelCheckpoint(tmp_path / "resumed", filename="{epoch}", save_top_k=-1)
    module = SmallNet()
    again = quantization(interval=interval, quantizer_lr=1e-3)
    trainer(again, keep, enable_checkpointing=True, max_epochs=4).fit(module, ckpt_path=path)
    a, b = (torch.load(p / "epoch=3.ckpt", weights_only=True) for p in (tmp_path, tmp_path / "resumed"))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    ours = "GradientQuantization"
    assert a["callbacks"][ours]["batches"] == b["callbacks"][ours]["batches"] == 16
    for x, y in zip(a["callbacks"][ours]["optimizers"], b["callbacks"][ours]["optimizers"], strict=True):
        assert x["steps"] == y["steps"]
        for i, state in x["adam"]["state"].items():
            assert torch.equal(state["exp_avg"], y["adam"]["state"][i]["exp_avg"])


def test_testing_from_a_checkpoint_gives_the_number_of_the_trained_module(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last", save_top_k=-1)
    module = fitted(quantization(), keep, enable_checkpointing=True, max_epochs=2)
    expected = trainer(quantization()).test(module, verbose=False)
    found = trainer(quantization()).test(SmallNet(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert found == expected


def test_load_from_checkpoint_rebuilds_any_class(tmp_path: Path) -> None:
    path = saved(tmp_path)
    loaded = load_from_checkpoint(SmallNet, path).eval()
    images, _ = next(iter(loaded.train_dataloader()))
    again = SmallNet()
    trainer(quantization()).test(again, ckpt_path=path, verbose=False)
    assert torch.equal(loaded(images), again.eval()(images))
    assert type(loaded) is SmallNet
    assert "load_state_dict" not in vars(SmallNet)


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_packages_own_task_loads_by_itself(tmp_path: Path, weights_only: bool) -> None:
    from lightning_quant import DigitsDataModule

    model = ImageClassifier("cifar_resnet20", model_kwargs={"in_chans": 1})
    run = trainer(GradientQuantization(6, 5, 4), max_steps=1, limit_val_batches=0)
    run.fit(model, DigitsDataModule())
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    layer = loaded.get_submodule("network.layer1.0.conv1")
    assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (6, 5)  # type: ignore[union-attr]


def test_loading_without_the_package_says_what_to_add(tmp_path: Path) -> None:
    path = saved(tmp_path)
    message = r"add GradientQuantization to .* callbacks, or load it with lightning_quant\.load_from_checkpoint"
    with pytest.raises(RuntimeError, match=message):
        SmallNet.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=message):
        trainer().test(SmallNet(), ckpt_path=path, verbose=False)


def test_training_a_rebuilt_module_without_the_callback_says_what_to_add(tmp_path: Path) -> None:
    loaded = load_from_checkpoint(SmallNet, saved(tmp_path))
    with pytest.raises(Exception, match=r"add lightning_quant\.GradientQuantization"):
        trainer().fit(loaded)


@pytest.mark.parametrize("which", ["weight_bits", "activation_bits", "gradient_bits"])
def test_a_checkpoint_of_another_bit_width_is_refused(tmp_path: Path, which: str) -> None:
    path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="made with 4 bits for a tensor that this module quantizes with 6"):
        trainer(quantization(**{which: 6})).fit(SmallNet(), ckpt_path=path)


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    for key, value in checkpoint["state_dict"].items():
        if key.endswith("_extra_state"):
            value[0] = 99
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"version 99 .* reads version 2: load it with the lightning_quant that"):
        load_from_checkpoint(SmallNet, path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(3, 3)

    with pytest.raises(CheckpointError, match=r"quantizes 'net\.0' and 3 other layers that Other does not have"):
        load_from_checkpoint(Other, saved(tmp_path))


def test_a_float_checkpoint_starts_a_quantized_training(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="float", save_top_k=-1)
    fitted(keep, enable_checkpointing=True)
    module = SmallNet()
    trainer(quantization(), max_epochs=2).fit(module, ckpt_path=tmp_path / "float.ckpt")
    assert module.net[3].weight_quantizer.ready  # type: ignore[union-attr]


def test_a_float_state_makes_a_trained_modules_ranges_start_anew() -> None:
    module = fitted(quantization(), max_steps=1)
    module.load_state_dict(SmallNet().state_dict())
    quantizer = module.get_submodule("net.3.input_quantizer")
    assert isinstance(quantizer, LearnedQuantizer)
    assert (quantizer.ready, quantizer.signed) == (False, None)


def test_a_tested_checkpoint_leaves_no_trace_in_the_next_training(tmp_path: Path) -> None:
    callback = quantization()
    trainer(callback).test(SmallNet(), ckpt_path=saved(tmp_path), verbose=False)
    trainer(callback).fit(SmallNet())
    assert (callback.batches, callback._optimizers[0].steps) == (4, 4)


def test_a_truncated_quantized_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["net.3.weight_quantizer.range"]
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.3\.weight_quantizer\.range"):
        load_from_checkpoint(SmallNet, path)


def test_other_layers_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(RuntimeError, match=r"net\.3"):
        trainer(quantization(exclude="net.3")).fit(SmallNet(), ckpt_path=path)
