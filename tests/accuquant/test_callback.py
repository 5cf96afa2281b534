"""AccuQuant as a callback of somebody's module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from helpers.small_diffusion import SHAPE, SMALL, Project, SmallDenoiser, batches, quiet_trainer
from lightning_quant import AccuQuant, load_from_checkpoint
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from lightning_quant.nn import strip


def callback(**arguments: Any) -> AccuQuant:
    return AccuQuant(**{**SMALL, "denoiser": "unet", "sample_shape": SHAPE, **arguments})


def test_what_is_tested_is_calibrated_first(tmp_path: Path) -> None:
    plain, quantized = Project(), Project()
    quiet_trainer(tmp_path).test(plain, batches(), verbose=False)
    quiet_trainer(tmp_path, callbacks=[callback()]).test(quantized, batches(), verbose=False)
    assert is_calibrated(quantized.unet)
    assert not torch.equal(quantized.seen[0], plain.seen[0])
    torch.testing.assert_close(quantized.seen[0], plain.seen[0], rtol=0.3, atol=0.3)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_any_evaluation_calibrates_and_the_next_does_not(tmp_path: Path, verb: str) -> None:
    module, ours = Project(), callback()
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, callbacks=[ours])
        getattr(trainer, verb)(module, batches())
    first = ours.calibration
    assert first is not None
    assert first.finished
    assert first.source.network is module.unet


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 2}, "weight_bits=4, and the callback says weight_bits=2"),
        ({"activation_bits": 3}, "activation_bits=8, and the callback says activation_bits=3"),
    ],
)
def test_other_bits_than_those_it_was_calibrated_with_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    module, given = Project(), {"weight_bits": 4, "activation_bits": 8, "first_and_last_bits": 6}
    quiet_trainer(tmp_path, callbacks=[callback(**given)]).test(module, batches(), verbose=False)
    quiet_trainer(tmp_path, callbacks=[callback(**given)]).test(module, batches(), verbose=False)
    with pytest.raises(QuantizationError, match=f"already quantized, with {message}: call lightning_quant.strip"):
        quiet_trainer(tmp_path, callbacks=[callback(**given | arguments)]).test(module, batches(), verbose=False)


def test_fit_stays_in_float_and_what_follows_calibrates_anew(tmp_path: Path) -> None:
    module, ours = Project(), callback()
    quiet_trainer(tmp_path, callbacks=[ours]).test(module, batches(), verbose=False)
    quiet_trainer(tmp_path, callbacks=[ours], max_steps=1).fit(module, batches())
    assert not is_calibrated(module)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_finished_calibration_is_taken_from_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Project(), Project()
    quiet_trainer(tmp_path, callbacks=[callback()]).test(first, batches(), verbose=False)
    ours = callback()
    quiet_trainer(tmp_path, callbacks=[ours]).test(second, batches(), verbose=False)
    assert torch.equal(first.seen[0], second.seen[0])
    assert "loaded from" in caplog.text


def test_stopped_it_goes_on_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, module = Project(), Project()
    quiet_trainer(tmp_path / "whole", callbacks=[callback()]).test(whole, batches(), verbose=False)
    from lightning_quant.accuquant.calibration import Calibration

    steps: list[int] = []
    step = Calibration.step

    def stopping(self: Calibration, *args: Any) -> str:
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args)

    monkeypatch.setattr(Calibration, "step", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_trainer(tmp_path, callbacks=[callback()]).test(module, batches(), verbose=False)
    assert not is_calibrated(module)
    monkeypatch.setattr(Calibration, "step", step)
    module.seen.clear()
    quiet_trainer(tmp_path, callbacks=[callback()]).test(module, batches(), verbose=False)
    assert torch.equal(module.seen[0], whole.seen[0])


def test_a_checkpoint_opens_in_a_float_class(tmp_path: Path) -> None:
    module = Project()
    trainer = quiet_trainer(tmp_path, callbacks=[callback(activation_parameters="per_group")])
    trainer.test(module, batches(), verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Project, tmp_path / "last.ckpt").eval()
    noise = torch.randn(3, *SHAPE)
    for t in (900, 20):
        times = torch.full((3,), t)
        assert torch.equal(loaded.unet(noise, times), module.unet(noise, timestep=times))
    again = Project()
    quiet_trainer(tmp_path, callbacks=[callback()]).test(
        again, batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert torch.equal(again.seen[0], module.seen[0])


def test_stripped_it_is_the_float_module_again(tmp_path: Path) -> None:
    plain, module = Project(), Project()
    quiet_trainer(tmp_path, callbacks=[callback()]).test(module, batches(), verbose=False)
    strip(module)
    noise, times = torch.randn(2, *SHAPE), torch.tensor([5, 5])
    assert torch.equal(module.unet(noise, times), plain.unet(noise, times))


def test_denoiser_and_scheduler_are_found(tmp_path: Path) -> None:
    from helpers.diffusion import tiny_unet

    class Own(Project):
        def __init__(self) -> None:
            super().__init__()
            self.unet = tiny_unet()

    parts = AccuQuant(**SMALL).parts(Own())
    assert type(parts.denoiser.network).__name__ == "UNet2DModel"
    assert isinstance(parts.scheduler, DDIMScheduler)
    config: Any = parts.denoiser.network.config
    assert parts.shape == (config.in_channels, config.sample_size, config.sample_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoiser": None}, r"Project has no denoiser of diffusers. Write AccuQuant\(denoiser='unet', ...\)"),
        ({"denoiser": "model.unet"}, r"denoiser='model.unet': Project has no such attribute"),
        ({"scheduler": "steps"}, r"scheduler='steps': Project has no such attribute"),
        ({"sample_shape": None}, r"SmallDenoiser has no config\.sample_size.*sample_shape=\(3, 32, 32\)"),
        ({"exclude": ["unett*"]}, r"exclude='unett\*' matches none"),
    ],
)
def test_what_cannot_be_found_is_said(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(tmp_path, callbacks=[callback(**arguments)]).test(Project(), batches(), verbose=False)


def test_a_scheduler_that_is_not_supported_is_named(tmp_path: Path) -> None:
    module = Project()
    module.noise_scheduler = EulerDiscreteScheduler()
    with pytest.raises(
        UnsupportedModelError, match=r"EulerDiscreteScheduler.*DDIMScheduler.*DPMSolverMultistepScheduler"
    ):
        quiet_trainer(tmp_path, callbacks=[callback()]).test(module, batches(), verbose=False)


def test_a_prediction_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    module = Project()
    module.noise_scheduler = DDIMScheduler(prediction_type="flow")
    with pytest.raises(ConfigurationError, match="prediction_type='flow'"):
        quiet_trainer(tmp_path, callbacks=[callback()]).test(module, batches(), verbose=False)


def test_nan_in_the_denoiser_is_found_before_anything_long(tmp_path: Path) -> None:
    module = Project()
    nn.init.constant_(module.unet.last.bias, torch.nan)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match=r"output contains NaN at step 0 \(timestep 830\)"):
        quiet_trainer(tmp_path, callbacks=[callback()]).test(module, batches(), verbose=False)
    assert not is_calibrated(module)


class Wanting(SmallDenoiser):
    """Also wants a shift of each image."""

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sample + context.view(-1, 1, 1, 1), timestep)


class Wider(SmallDenoiser):
    """Takes four channels more than it makes, as for inpainting."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample[:, :1], timestep)


def tiny(**options: Any) -> Any:
    from helpers.diffusion import tiny_condition_unet, tiny_unet

    return tiny_condition_unet() if not options else tiny_unet(**options)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (
            tiny,
            {"sample_shape": None},
            r"state of shape \(1, .*TypeError: .*'encoder_hidden_states'\n.*takes encoder_hidden_states, class_labels"
            r".*conditioning\(self, pl_module, ids\): return \{'encoder_hidden_states': ROWS\}.*prompts=FILE",
        ),
        (
            tiny,
            {"sample_shape": None, "guidance": 7.5},
            r"guidance=7.5 needs both .*encoder_hidden_states and uncond_encoder_hidden_states",
        ),
        (
            lambda: tiny(num_class_embeds=10),
            {"sample_shape": None},
            r"ValueError: class_labels should be provided.*\n.*takes class_labels.*return \{'class_labels': ROWS\}",
        ),
        (Wanting, {}, r"no condition, and raised TypeError.*'context'\n.*takes context\..*\{'context': ROWS\}"),
        (
            SmallDenoiser,
            {"sample_shape": (3, 4, 4)},
            r"shape \(1, 3, 4, 4\).*RuntimeError.*\n.*sample_shape=\(C, H, W\)",
        ),
        (Wider, {"sample_shape": (5, 4, 4)}, r"Wider returned \(1, 1, 4, 4\) for a state \(1, 5, 4, 4\)"),
    ],
)
def test_a_denoiser_that_cannot_be_called_is_refused_before_any_work(
    tmp_path: Path, network: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    module = Project()
    module.unet = network()  # type: ignore[assignment]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ConfigurationError, UnsupportedModelError), match=message):
        quiet_trainer(tmp_path, callbacks=[callback(**arguments)]).test(module, batches(), verbose=False)
    assert not list(tmp_path.rglob("*"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_conditions_of_a_subclass_are_given_to_the_denoiser(tmp_path: Path) -> None:
    class Conditioned(AccuQuant):
        def conditioning(self, pl_module: pl.LightningModule, ids: Sequence[int]) -> dict[str, Tensor]:
            return {"context": torch.tensor([0.1 * (number % 3) for number in ids])}

    module = Project()
    module.unet = Wanting()
    ours = Conditioned(**{**SMALL, "denoiser": "unet", "sample_shape": SHAPE})
    module.test_step = lambda batch: None  # type: ignore[method-assign, assignment]
    quiet_trainer(tmp_path, callbacks=[ours]).test(module, batches(), verbose=False)
    assert ours.calibration is not None
    assert ours.calibration.finished
