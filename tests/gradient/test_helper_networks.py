"""Modules that hold more than the network that trains: frozen helpers, several networks, averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.networks import SmallNet, trainer
from lightning_quant import load_from_checkpoint
from lightning_quant.errors import ConfigurationError
from lightning_quant.gradient import GradientQuantization
from lightning_quant.nn import strip

DECAY = 0.5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def body() -> nn.Sequential:
    """The network of a SmallNet: three of its four layers are first, last or in the middle."""
    return SmallNet().net


class Helped(SmallNet):
    """With a frozen network that judges its output, as a perceptual loss or a teacher does."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = body().requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), self.helper(batch[0]))


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_frozen_helper_computes_in_float_as_before(evaluates: bool) -> None:
    module, x = Helped(), torch.randn(4, 3, 8, 8)
    module.helper.train(not evaluates)
    expected = copy.deepcopy(module.helper).train(not evaluates)(x)
    called = []
    module.helper.register_forward_hook(lambda layer, args, output: called.append(output))
    run = trainer(GradientQuantization())
    run.fit(module)
    assert called
    assert torch.allclose(copy.deepcopy(module.helper).train(not evaluates)(x), expected, atol=1e-6)
    assert [type(layer) for layer in module.helper] == [type(layer) for layer in body()]
    run.test(module, verbose=False)


# -- averages --------------------------------------------------------------------------------------------------------


class Averaged(SmallNet):
    """Keeps an average of its network, made before anything is quantized."""

    def __init__(self, kind: str = "AveragedModel") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.average = AVERAGES[kind][0](self.net)
        self.history: list[dict[str, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if not self.history:
            self.note()
        loss = super().training_step(batch, batch_idx)
        for name, value in self.net.state_dict().items():
            if name.endswith(".range") and self.history[0][name].isnan():
                self.history[0][name] = value.clone()
        return loss

    def note(self) -> None:
        self.history.append({name: value.clone() for name, value in self.net.state_dict().items()})

    def on_train_batch_end(self, *args: Any) -> None:
        self.note()
        AVERAGES[self.hparams["kind"]][1](self.average, self.net)

    def copied(self) -> Any:
        return getattr(self.average, "module", self.average)


def _by_parameters(average: nn.Module, net: nn.Module) -> None:
    for mine, its in zip(average.parameters(), net.parameters(), strict=True):
        mine.data.lerp_(its.data, 1 - DECAY)


def _by_names(average: nn.Module, net: nn.Module) -> None:
    state = net.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(state[name], 1 - DECAY)


def _averaged(use_buffers: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers)


def _frozen(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda net: make(net).requires_grad_(False)


AVERAGES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any, nn.Module], None]]] = {
    "frozen copy, parameters": (_frozen(copy.deepcopy), _by_parameters),
    "frozen copy, names": (_frozen(copy.deepcopy), _by_names),
    "copy, names": (copy.deepcopy, _by_names),
    "AveragedModel": (_averaged(use_buffers=True), AveragedModel.update_parameters),
    "AveragedModel, parameters": (_averaged(use_buffers=False), AveragedModel.update_parameters),
    "frozen AveragedModel": (_frozen(_averaged(use_buffers=True)), AveragedModel.update_parameters),
    "ModelEmaV2": (lambda net: ModelEmaV2(net, DECAY), ModelEmaV2.update),
    "ModelEmaV3": (lambda net: ModelEmaV3(net, DECAY), ModelEmaV3.update),
}


def expected_average(module: Averaged, name: str) -> Tensor:
    """Of a tensor of the network after each step, from its first value on, in float64."""
    first, *steps = [state[name].double() for state in module.history]
    if "AveragedModel" in module.hparams["kind"]:
        first, *steps = steps  # Its first update copies.
    for value in steps:
        first = first * DECAY + value * (1 - DECAY)
    return first


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_a_quantized_network_has_the_average_of_each_tensor(kind: str) -> None:
    torch.manual_seed(0)
    module = Averaged(kind)
    trainer(GradientQuantization(quantizer_lr=1e-2), max_epochs=2).fit(module)
    state = module.copied().state_dict()
    names = [name for name, _ in module.net.named_parameters()]
    if "frozen copy" not in kind:
        assert list(state) == list(module.net.state_dict())
    if "parameters" not in kind:
        names += [name for name in state if name.endswith((".range", ".running_mean", ".running_var"))]
    for name in names:
        torch.testing.assert_close(state[name].double(), expected_average(module, name), rtol=1e-4, atol=1e-6)
        assert not torch.equal(state[name], module.net.state_dict()[name])


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_computes_as_the_network_with_its_tensors(kind: str) -> None:
    torch.manual_seed(0)
    module = Averaged(kind)
    trainer(GradientQuantization(quantizer_lr=1e-2), max_epochs=2).fit(module)
    oracle = copy.deepcopy(module.net)
    if "frozen copy" in kind:
        strip(oracle)
    oracle.load_state_dict(module.copied().state_dict())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(module.copied().eval()(x), oracle.eval()(x))
        assert not torch.equal(module.copied()(x), strip(oracle)(x)) or "frozen copy" in kind


@pytest.mark.parametrize("kind", ["AveragedModel", "frozen copy, names"])
def test_a_module_with_an_average_goes_on_from_its_checkpoint(kind: str, tmp_path: Path) -> None:
    module = Averaged(kind)
    run = trainer(GradientQuantization(), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "one.ckpt")
    trainer(GradientQuantization(), max_epochs=2).fit(Averaged(kind), ckpt_path=tmp_path / "one.ckpt")
    for loaded in (module, load_from_checkpoint(Averaged, tmp_path / "one.ckpt")):
        trainer(GradientQuantization()).test(loaded, verbose=False)
        trainer(GradientQuantization(), max_epochs=1).fit(loaded)


def test_a_validation_before_the_first_average_is_not_one_of_nan() -> None:
    losses = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            losses.append(float(trainer.callback_metrics["val/loss"]))

    averaging = EMAWeightAveraging(decay=DECAY, update_starting_at_step=6)
    trainer(GradientQuantization(), averaging, Watch(), max_epochs=2).fit(SmallNet())
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()


# -- what is frozen and trains later ---------------------------------------------------------------------------------


class Fine(SmallNet):
    """A frozen backbone without norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.backbone(images))
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_what_a_callback_before_ours_froze_is_not_left_in_float() -> None:
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    with pytest.raises(ConfigurationError, match=r"stands before GradientQuantization, and backbone\.0, backbone\.2"):
        trainer(thaw, GradientQuantization(), max_epochs=2).fit(Fine())
    module = Fine()
    trainer(GradientQuantization(), thaw, max_epochs=2).fit(module)
    assert list(GradientQuantization().plan(module).chosen) == ["backbone.2", "net.1", "net.3"]


def test_what_trains_later_in_float_is_said() -> None:
    class Thawing(Fine):
        def on_train_epoch_start(self) -> None:
            if self.trainer.current_epoch == 1:
                self.backbone.requires_grad_(True)

    module = Thawing()
    module.backbone.requires_grad_(False)
    message = r"2 layers were frozen when the module was quantized and train now, in float: backbone\.0, backbone\.2"
    with pytest.warns(UserWarning, match=message):
        trainer(GradientQuantization(), max_epochs=2).fit(module)


def test_a_frozen_backbone_can_be_included() -> None:
    module = Fine()
    module.backbone.requires_grad_(False)
    assert list(GradientQuantization().plan(module).chosen) == ["net.3"]
    callback = GradientQuantization(include="*")
    assert list(callback.plan(module).chosen) == ["backbone.2", "net.1", "net.3"]
    trainer(callback).fit(module)
    trainer(callback).test(module, verbose=False)
