from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.networks import SmallNet, fitted, quantization, trainer
from lightning_quant import load_from_checkpoint, strip
from lightning_quant.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from lightning_quant.gradient import (
    FixedInterval,
    GradientQuantization,
    IntervalStrategy,
    LargeGradientInterval,
    MinimumErrorInterval,
    MinMaxInterval,
)
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import QuantizedLayer


def quantized(module: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


def gamma(layer: QuantizedLayer) -> float:
    assert isinstance(layer.gradient_quantizer, GradientQuantizer)
    return float(layer.gradient_quantizer.gamma)


def accuracy(module: SmallNet) -> float:
    module.eval()
    hits = [(module(images).argmax(1) == labels).float() for images, labels in module.train_dataloader()]
    return float(torch.cat(hits).mean())


@pytest.mark.parametrize(
    "interval",
    [LargeGradientInterval(0.05), MinMaxInterval(), FixedInterval(0.6), MinimumErrorInterval(every=2), None],
)
def test_every_strategy_trains(interval: IntervalStrategy | None) -> None:
    assert accuracy(fitted(quantization(interval=interval), max_epochs=12, decay=0.9)) > 0.8


def test_eight_bits_train_like_float() -> None:
    plain = accuracy(fitted(max_epochs=12, decay=0.9))
    eight = accuracy(fitted(quantization(weight_bits=8, activation_bits=8, gradient_bits=8), max_epochs=12, decay=0.9))
    assert plain > 0.9
    assert abs(plain - eight) <= 0.07


def test_a_strategy_of_the_users_own_works() -> None:
    class Halving(IntervalStrategy):
        def start(self, magnitude: Tensor, bits: int) -> Tensor:
            return magnitude.new_tensor(0.8)

        def step(self, gamma: Tensor, clipped: Tensor, target: Tensor) -> Tensor:
            return gamma / 2

    module = fitted(quantization(interval=Halving()), max_steps=3)
    assert {round(gamma(layer), 6) for layer in quantized(module).values()} == {0.1}


def test_gamma_moves_by_one_step_an_optimizer_step_however_many_micro_batches() -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            seen.append(gamma(quantized(pl_module)["net.3"]))

    fitted(quantization(interval=LargeGradientInterval(0.1, 0.01)), Watch(), accumulate_grad_batches=2, max_epochs=2)
    assert seen[0] != seen[1]
    assert seen[1] == seen[2]
    moves = [abs(b - a) for a, b in zip(seen[1::2], seen[3::2], strict=False)]
    assert all(move == pytest.approx(0.01, abs=1e-6) or seen[-1] == 1.0 for move in moves)


def test_counts_of_micro_batches_add_up() -> None:
    totals: list[float] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            quantizer = quantized(pl_module)["net.3"].gradient_quantizer
            assert isinstance(quantizer, GradientQuantizer)
            assert quantizer.run.total is not None
            totals.append(float(quantizer.run.total))

    fitted(quantization(), Watch(), accumulate_grad_batches=2)
    assert totals == [2 * 8 * 8 * 8 * 8] * 2


def test_the_users_optimizer_holds_no_range_and_ranges_learn() -> None:
    held: list[int] = []

    class Watch(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            held.extend(id(p) for group in trainer.optimizers[0].param_groups for p in group["params"])

    torch.manual_seed(0)
    module = SmallNet()
    expected = {id(p) for p in module.parameters()}
    trainer(quantization(quantizer_lr=1e-2), Watch(), max_steps=1).fit(module)
    before = {name: layer.weight_quantizer.range.clone() for name, layer in quantized(module).items()}  # type: ignore[union-attr, operator]
    assert set(held) == expected
    trainer(quantization(quantizer_lr=1e-2), max_steps=3).fit(module)
    after = {name: layer.weight_quantizer.range for name, layer in quantized(module).items()}  # type: ignore[union-attr]
    assert all(after[name] != before[name] for name in before)


def test_the_learning_rate_of_ranges_follows_the_users_schedule() -> None:
    callback = quantization(quantizer_lr=1e-3)
    fitted(callback, max_epochs=3)
    assert callback._optimizers[0].adam is not None
    assert callback._optimizers[0].adam.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


class Adversaries(pl.LightningModule):
    """Two networks, two optimizers, manual optimization, no toggling."""

    def __init__(self, generator_lr: float = 0.01) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator_lr = generator_lr
        self.losses = 0
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        self.range_gradients: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[attr-defined, misc]
        first.zero_grad()
        self.manual_backward(self.critic(self.generator(batch)).mean())
        first.step()
        second.zero_grad()
        loss = (self.critic(torch.ones(8, 6)) - self.critic(self.generator(batch).detach())).mean()
        self.manual_backward(loss)
        quantizer = self.critic[0].weight_quantizer
        self.range_gradients.append(float(quantizer.range.grad))  # type: ignore[union-attr, arg-type]
        second.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=self.generator_lr),
            torch.optim.Adam(self.critic.parameters(), lr=0.01),
        ]

    def train_dataloader(self) -> Any:
        return torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))


def test_manual_optimization_with_two_optimizers_steps_each_networks_own_quantizers() -> None:
    torch.manual_seed(0)
    module = Adversaries()
    callback = quantization()
    trainer(callback).fit(module)
    assert [len(ours.gradient_quantizers) for ours in callback._optimizers] == [2, 2]
    assert [ours.steps for ours in callback._optimizers] == [4, 4]
    assert all(layer.weight_quantizer.range.grad is None for layer in quantized(module.critic).values())  # type: ignore[union-attr]


def test_a_layer_whose_weight_derives_from_others_belongs_to_their_optimizer() -> None:
    torch.manual_seed(0)
    module = Adversaries()
    module.critic = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8, bias=False)), nn.ReLU(), nn.Linear(8, 1, bias=False)
    )
    callback = quantization()
    trainer(callback).fit(module)
    assert [list(ours.gradient_quantizers) for ours in callback._optimizers] == [
        ["generator.0", "generator.2"],
        ["critic.0", "critic.2"],
    ]


def test_a_loss_that_zero_grad_threw_away_leaves_no_trace_in_the_ranges() -> None:
    class OnlyCritic(Adversaries):
        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self.losses += 1
            if self.losses == 2:
                super().manual_backward(loss)

    gradients = []
    for kind in (Adversaries, OnlyCritic):
        torch.manual_seed(0)
        module = kind(generator_lr=0.0)
        trainer(quantization(gradient_bits=32), max_steps=1, limit_train_batches=1).fit(module)
        gradients.append(module.range_gradients[0])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_starts_and_counts_once(reentrant: bool) -> None:
    class Recomputing(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.net[:3](images)
            hidden = checkpoint(self.net[3:6], hidden, use_reentrant=reentrant)
            logits: Tensor = self.net[6:](hidden)
            return logits

    states = []
    for kind in (SmallNet, Recomputing):
        pl.seed_everything(0, verbose=False)
        module = kind()
        trainer(quantization(interval=LargeGradientInterval(0.1)), max_steps=2).fit(module)
        states.append({k: v for k, v in module.state_dict().items() if "quantizer" in k})
    for key, value in states[0].items():
        # The recomputed input has no ReLU before it and is packed, which rounds the ranges' gradients.
        torch.testing.assert_close(value, states[1][key], rtol=1e-4 if key.endswith("range") else 0, atol=0, msg=key)


def test_validation_in_between_changes_nothing() -> None:
    a, b = (fitted(quantization(), max_epochs=2, limit_val_batches=n).state_dict() for n in (0, 4))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_sanity_check_does_not_start_quantizers() -> None:
    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert not any(layer.input_quantizer.ready for layer in quantized(pl_module).values())  # type: ignore[union-attr]

    fitted(quantization(), Watch(), num_sanity_val_steps=2, max_steps=1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_keeps_quantizer_state_in_fp32(precision: Any) -> None:
    module = fitted(quantization(), precision=precision, max_steps=2)
    for layer in quantized(module).values():
        for quantizer in (layer.input_quantizer, layer.weight_quantizer, layer.gradient_quantizer):
            assert quantizer is not None
            assert {buffer.dtype for buffer in quantizer.buffers()} == {torch.float32}
            assert quantizer.ready


def test_integer_execution_trains_to_the_same_weights() -> None:
    a, b = (fitted(quantization(execution=kind), max_steps=3).state_dict() for kind in ("simulated", "integer"))
    for key, value in a.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, b[key], rtol=1e-3, atol=1e-4)


def test_which_path_runs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fitted(quantization(), max_steps=1)
    assert "simulated in floating point" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        fitted(quantization(execution="integer"), max_steps=1)
    assert "int8 codes with int32 sums" in caplog.text


@pytest.mark.parametrize("which", ["weight", "activation", "gradient"])
def test_thirty_two_bits_leave_a_tensor_alone(which: str) -> None:
    module = fitted(quantization(**{f"{which}_bits": 32}), max_steps=1)
    attribute = {"weight": "weight_quantizer", "activation": "input_quantizer", "gradient": "gradient_quantizer"}
    for layer in quantized(module).values():
        empty = [name for name in attribute.values() if getattr(layer, name) is None]
        assert empty == [attribute[which]]


def test_float_gradients_equal_plain_training_when_everything_is_float_but_unused_bits() -> None:
    plain = fitted(max_steps=3).state_dict()
    wide = fitted(quantization(weight_bits=16, activation_bits=32, gradient_bits=32), max_steps=3).state_dict()
    for key, value in plain.items():
        torch.testing.assert_close(value, wide[key], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("bits", [{"weight_bits": 32, "activation_bits": 32}, {"gradient_bits": 32}])
def test_what_was_trained_can_be_tested_whatever_was_left_in_float(bits: dict[str, int]) -> None:
    module = fitted(quantization(**bits), max_steps=1)
    assert trainer(quantization(**bits)).test(module, verbose=False)


def test_training_on_without_the_callback_is_refused() -> None:
    module = fitted(quantization(), max_steps=1)
    with pytest.raises(QuantizationError, match=r"add lightning_quant\.GradientQuantization"):
        trainer(max_steps=2).fit(module)


def test_averaged_weights_keep_the_grid_of_the_trained_ones(tmp_path: Path) -> None:
    averaging = EMAWeightAveraging(decay=0.5)
    keep = ModelCheckpoint(tmp_path, filename="ema")
    module = fitted(quantization(), averaging, keep, enable_checkpointing=True, max_epochs=2)
    loaded = load_from_checkpoint(SmallNet, tmp_path / "ema.ckpt")
    for name, layer in quantized(loaded).items():
        trained = quantized(module)[name].input_quantizer
        assert layer.input_quantizer.signed == trained.signed  # type: ignore[union-attr]
        assert layer.input_quantizer.ready  # type: ignore[union-attr]
    with pytest.raises(ConfigurationError, match="stands before GradientQuantization"):
        fitted(EMAWeightAveraging(), quantization(), max_steps=1)


def test_a_layer_under_several_names_is_quantized_and_rebuilt_once(tmp_path: Path) -> None:
    trainer(quantization(), max_steps=1).fit(shared := Shared())
    run = trainer(quantization(), max_steps=2)
    run.fit(shared)
    run.save_checkpoint(tmp_path / "shared.ckpt")
    loaded = load_from_checkpoint(Shared, tmp_path / "shared.ckpt")
    assert loaded.net[8] is loaded.net[9]
    assert len(quantized(loaded)) == len(quantized(shared)) == 4


class Shared(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.net[9] = self.net[8]


def test_double_precision_trains() -> None:
    module = fitted(quantization(), precision="64-true", max_steps=2)
    assert module.net[0].weight.dtype == torch.float64


def test_a_frozen_body_is_not_walked_back_through() -> None:
    module = SmallNet()
    module.net[:8].requires_grad_(False)
    calls: list[str] = []
    original = GradientQuantizer.quantize

    def count(self: GradientQuantizer, gradient: Tensor) -> Any:
        calls.append("once")
        return original(self, gradient)

    with mock.patch.object(GradientQuantizer, "quantize", count):
        trainer(quantization(), max_steps=1).fit(module)
    assert len(calls) == 2


def test_the_learning_rate_finder_works() -> None:
    module = SmallNet()
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None)
    trainer(quantization(), finder, max_steps=2, enable_checkpointing=False).fit(module)
    assert quantized(module)["net.3"].weight_quantizer.ready  # type: ignore[union-attr]


def test_layers_that_no_tensor_reached_are_named() -> None:
    class Bypassing(SmallNet):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.net[:10](images)
            return F.linear(hidden, self.net[10].weight, self.net[10].bias)  # type: ignore[arg-type]

    with pytest.warns(UserWarning, match=r"1 layers are still in float after an epoch.*net\.10"):
        trainer(quantization()).fit(Bypassing())


def test_the_sign_of_an_input_can_be_given() -> None:
    module = fitted(quantization(signed={"net.3": True}), max_steps=1)
    assert [layer.input_quantizer.signed for layer in quantized(module).values()] == [True, True, False, True]  # type: ignore[union-attr]
    with pytest.raises(ConfigurationError, match=r"signed='net\.4' matches none"):
        fitted(quantization(signed={"net.4": True}), max_steps=1)


def test_first_and_last_policies() -> None:
    def bits(policy: Any) -> list[str]:
        return [
            "float" if row.bits is None else str(row.bits)
            for row in GradientQuantization(first_and_last=policy).plan(SmallNet()).layers
        ]

    assert bits("float") == ["float", "4/4/4", "4/4/4", "float"]
    assert bits("8bit") == ["8/8/8", "4/4/4", "4/4/4", "8/8/8"]
    assert bits("same") == ["4/4/4"] * 4


def test_measures_of_every_layer_reach_the_logger(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path, name="run", version="")
    fitted(quantization(log_every_n_steps=2), logger=logger, log_every_n_steps=1)
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    for layer in ("net.0", "net.3", "net.8", "net.10"):
        for measure in ("gamma", "clipped", "target", "error", "error_large", "zero"):
            assert f"gradient_quantization/{layer}/{measure}" in header


def test_fit_twice_goes_on_and_strip_gives_the_float_network_back() -> None:
    module = fitted(quantization(), max_steps=2)
    trainer(quantization(), max_steps=2).fit(module)
    plain = SmallNet()
    weights = {name: value.clone() for name, value in module.named_parameters()}
    assert strip(module) is module
    assert list(module.state_dict()) == list(plain.state_dict())
    assert not quantized(module)
    assert all(torch.equal(value, weights[name]) for name, value in module.named_parameters())
    plain.load_state_dict(module.state_dict())


def test_another_callback_on_a_quantized_module_is_refused() -> None:
    module = fitted(quantization(), max_steps=1)
    with pytest.raises(QuantizationError, match=r"already quantized.*lightning_quant\.strip"):
        trainer(quantization(weight_bits=6), max_steps=1).fit(module)


def test_testing_what_was_never_trained_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"never trained quantized: call trainer\.fit"):
        trainer(quantization()).test(SmallNet(), verbose=False)


def test_layers_made_in_configure_model_are_found() -> None:
    class Late(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = None  # type: ignore[assignment]

        def configure_model(self) -> None:
            if self.net is None:
                self.net = SmallNet().net

    module = Late()
    trainer(quantization(), max_steps=1).fit(module)
    assert len(quantized(module)) == 4


def test_a_frozen_layer_keeps_its_ranges() -> None:
    module = SmallNet()
    module.net[3].weight.requires_grad_(False)
    trainer(quantization(quantizer_lr=0.1), max_steps=1).fit(module)
    before = quantized(module)["net.3"].weight_quantizer.range.clone()  # type: ignore[union-attr, operator]
    trainer(quantization(quantizer_lr=0.1), max_steps=3).fit(module)
    assert torch.equal(module.net[3].weight_quantizer.range, before)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(module.net[0].weight_quantizer.range, before)  # type: ignore[union-attr, arg-type]


def test_several_and_keyword_inputs_pass() -> None:
    class Keywords(SmallNet):
        def forward(self, images: Tensor, *, scale: float = 1.0) -> Tensor:  # type: ignore[override]
            return super().forward(images) * scale

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0], scale=2.0), batch[1])

    module = Keywords()
    trainer(quantization(), max_steps=1).fit(module)
    assert len(quantized(module)) == 4


@pytest.mark.parametrize("bits", [1, 17, 33, 4.0, True])
@pytest.mark.parametrize("which", ["weight_bits", "activation_bits", "gradient_bits"])
def test_bits_out_of_range_are_refused(which: str, bits: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{which}={bits}: expected a whole number from 2 to 16, or 32"):
        GradientQuantization(**{which: bits})


def test_a_wrong_learning_rate_or_execution_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected an instance of a strategy"):
        GradientQuantization(interval=MinMaxInterval)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="first_and_last='last'"):
        GradientQuantization(first_and_last="last")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="quantizer_lr=-1"):
        GradientQuantization(quantizer_lr=-1)
    with pytest.raises(ConfigurationError, match="execution='fast'"):
        GradientQuantization(execution="fast")  # type: ignore[arg-type]


class NoLayers(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Lazy(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 3))


class Scripted(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = torch.jit.trace(self.net[3], torch.zeros(1, 8, 8, 8))


class Complex(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.net[8] = nn.Linear(8, 8, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoLayers, "NoLayers has no Conv and no Linear layer"),
        (Lazy, "uninitialized"),
        (Scripted, "TorchScript"),
        (Complex, "net.8 has a torch.complex64 weight"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_modules_that_cannot_be_quantized_are_refused(module: type[SmallNet], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trainer(quantization()).fit(module())


def test_a_pattern_that_matches_nothing_names_what_is_near() -> None:
    with pytest.raises(
        ConfigurationError, match=r"include='net\.33' matches none of the 4 layers\. Close matches: .*net\.3"
    ):
        trainer(quantization(include="net.33")).fit(SmallNet())
