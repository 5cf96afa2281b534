import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.cli.lightning_cli import build
from lightning_quant.cli.packaged import FOLDER, describe, names
from lightning_quant.data import DigitsDataModule
from lightning_quant.data.fashion_mnist import FashionMNISTDataModule
from lightning_quant.data.noise import initial_noise
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.tasks.denoisers import described, learned_target, noise_scheduler
from lightning_quant.tasks.diffusion import ImageDiffusion

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
}


def diffusion(network: dict[str, Any] | None = None, **arguments: Any) -> ImageDiffusion:
    seed_everything(0)
    return ImageDiffusion({**TINY, **(network or {})}, **{"sampling_steps": 3, **arguments})


def trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(**{"default_root_dir": folder, "accelerator": "cpu", "max_steps": 4, **quiet, **arguments})


def loader(images: int = 8, batch_size: int = 4, size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 1, size, size, generator=generator) * 2 - 1
    return DataLoader(TensorDataset(pixels, torch.arange(images) % 10), batch_size=batch_size)


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_learns_to_tell_noise_from_digits(tmp_path: Path) -> None:
    module = diffusion(optimizer=lambda params: torch.optim.Adam(params, lr=5e-3))
    data = DigitsDataModule(batch_size=64, mean=[0.5], std=[0.5])
    run = trainer(tmp_path, max_steps=60)
    (before,) = run.validate(module, data, verbose=False)
    run.fit(module, data)
    (after,) = run.validate(module, data, verbose=False)
    assert before["val/loss"] > 0.9
    assert after["val/loss"] < 0.5 * before["val/loss"]


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_what_is_learned_leads_the_scheduler_to_the_clean_image(kind: str, prediction: str) -> None:
    scheduler = noise_scheduler({"_class_name": kind, "prediction_type": prediction, "clip_sample": False})
    scheduler.set_timesteps(1000)
    images, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    for timestep in (1, 300, 700):
        timesteps = torch.tensor([timestep, timestep])
        noisy = scheduler.add_noise(images, noise, timesteps)
        target = learned_target(scheduler, images, noise, timesteps)
        found = scheduler.step(target, timestep, noisy).pred_original_sample
        torch.testing.assert_close(found, images, atol=2e-4, rtol=1e-4)


def test_training_regresses_on_that_target(monkeypatch: pytest.MonkeyPatch) -> None:
    module = diffusion(scheduler={"prediction_type": "sample"})
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    images, labels = next(iter(loader()))
    monkeypatch.setattr(module, "forward", lambda noisy, timesteps, labels: images + 0.5)
    assert module.training_step((images, labels), 0).item() == pytest.approx(0.25)


def test_validation_repeats_and_does_not_depend_on_the_batches(tmp_path: Path) -> None:
    module = diffusion()
    losses = []
    for batch_size in (4, 4, 3, 8):
        torch.manual_seed(batch_size)
        (result,) = trainer(tmp_path).validate(module, loader(8, batch_size), verbose=False)
        losses.append(result["val/loss"])
    assert losses[0] == losses[1]
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-5)
    (tested,) = trainer(tmp_path).test(module, loader(8), verbose=False)
    assert tested["test/loss"] == losses[0]


def test_two_ranks_validate_as_one(tmp_path: Path) -> None:
    module = diffusion()
    (alone,) = trainer(tmp_path).validate(module, loader(8, 4), verbose=False)
    (together,) = trainer(tmp_path, devices=2, strategy="ddp_fork").validate(module, loader(8, 2), verbose=False)
    assert together["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-5)


def test_an_image_depends_on_its_id_alone() -> None:
    module = diffusion().eval()
    together = module.generate(torch.tensor([3, 9, 3, 1]))
    assert together.shape == (4, 1, 8, 8)
    assert together.min() >= 0
    assert together.max() <= 1
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    torch.testing.assert_close(module.generate(torch.tensor([1, 9])), together[[3, 1]])
    other = ImageDiffusion(module.network, sampling_steps=3, seed=1).eval()
    assert not torch.equal(other.generate(torch.tensor([3])), together[:1])


def test_predict_takes_ids_or_counts_the_images_of_the_data(tmp_path: Path) -> None:
    module = diffusion().eval()
    expected = module.generate(torch.arange(5))
    by_id: Any = trainer(tmp_path).predict(module, DataLoader(range(5), batch_size=2))  # type: ignore[arg-type]
    by_image: Any = trainer(tmp_path).predict(module, loader(5, batch_size=3))
    for batches in (by_id, by_image):
        torch.testing.assert_close(torch.cat(batches), expected)


@pytest.mark.parametrize("kind", ["DDIM", "DDPM"])
def test_the_saved_pipeline_generates_the_same_images(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.pipelines.ddim import pipeline_ddim

    module = diffusion(scheduler={"_class_name": f"{kind}Scheduler", "beta_schedule": "squaredcos_cap_v2"}).eval()
    module.save_pipeline(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)).__name__ == f"{kind}Pipeline"
    pipeline: Any = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda shape, **_: initial_noise(shape[1:], [4, 7], seed=0))
    found = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    expected = module.generate(torch.tensor([4, 7])).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-6, rtol=1e-5)


class _History(Callback):
    """The weights after every step, and the mean that they should have."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = parameters(pl_module)
        before = self.mean or now
        self.mean = [self.decay * old + (1 - self.decay) * new for old, new in zip(before, now, strict=True)]


def test_a_fit_leaves_a_pipeline_and_checkpoints_with_averaged_weights(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    module = diffusion(pipeline=str(tmp_path / "made"), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    history = _History(decay=0.5)
    run = trainer(tmp_path, callbacks=[history, EMAWeightAveraging(decay=0.5)])
    run.fit(module, loader(16), loader(4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved: Any = UNet2DModel.from_pretrained(tmp_path / "made" / "unet")
    loaded = ImageDiffusion.load_from_checkpoint(tmp_path / "last.ckpt")
    for network in (saved, loaded.network, module.network):
        for found, expected in zip(parameters(network), history.mean, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_rebuilds_the_module_alone(tmp_path: Path) -> None:
    first = diffusion(scheduler={"beta_end": 0.01, "prediction_type": "v_prediction"}, padding=1)
    first.save_pipeline(tmp_path / "first")
    module = ImageDiffusion(str(tmp_path / "first"), str(tmp_path / "first"), padding=1)
    for mine, given in zip(module.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, given)
    assert module.network.training
    run = trainer(tmp_path)
    run.fit(module, loader(size=6))
    run.save_checkpoint(tmp_path / "last.ckpt")
    shutil.rmtree(tmp_path / "first")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["hyper_parameters"].keys() == {"network", "scheduler", "padding"}
    loaded = ImageDiffusion.load_from_checkpoint(tmp_path / "last.ckpt", sampling_steps=50).eval()
    assert torch.equal(loaded.generate(torch.arange(2)), module.eval().generate(torch.arange(2)))
    assert described(loaded.scheduler) == described(first.scheduler)
    assert described(loaded.network) == described(first.network)


def test_labels_are_the_conditioning_where_the_network_takes_them(tmp_path: Path) -> None:
    module = diffusion({"num_class_embeds": 10}).eval()
    ids = torch.tensor([1, 1])
    images = module.predict_step([ids, torch.tensor([2, 5])], 0)
    assert not torch.allclose(images[0], images[1])
    torch.testing.assert_close(images, module.generate(ids, torch.tensor([2, 5])))
    with pytest.raises(ConfigurationError, match=r"num_class_embeds=10, found a batch without labels.*\(ids, labels\)"):
        module.predict_step(ids, 0)
    without = diffusion().eval()
    assert torch.equal(without.predict_step([ids, torch.tensor([2, 5])], 0), without.predict_step(ids, 0))
    with pytest.raises(ConfigurationError, match=r"10 classes, the network num_class_embeds=4\. Write num_class"):
        trainer(tmp_path).fit(diffusion({"num_class_embeds": 4}), DigitsDataModule(mean=[0.5], std=[0.5]))


def test_padding_is_background_and_is_cut_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = diffusion(padding=1).eval()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    seen = torch.empty(4, 1, 8, 8)
    monkeypatch.setattr(module.scheduler, "add_noise", lambda images, *_: seen.copy_(images))
    images, labels = next(iter(loader(size=6)))
    module.training_step((images, labels), 0)
    assert torch.equal(seen[:, :, 1:-1, 1:-1], images)
    seen[:, :, 1:-1, 1:-1] = -1
    assert torch.equal(seen, -torch.ones(4, 1, 8, 8))
    assert module.generate(torch.tensor([0])).shape == (1, 1, 6, 6)


def test_images_of_another_size_or_range_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with pytest.raises(ConfigurationError, match=r"Found images \(1, 6, 6\), 0 pixels of padding .* \(1, 8, 8\)"):
        run.fit(diffusion(), loader(size=6))
    with pytest.raises(ConfigurationError, match=r"in \[-1, 1\], found values from -0.812 to 1.85\. Write mean"):
        run.fit(diffusion(), DigitsDataModule())
    with pytest.raises(ConfigurationError, match=r"found values from 0 to 1"):
        run.validate(diffusion(), DigitsDataModule(mean=[0.0], std=[1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": {"_class_name": "PNDMScheduler"}}, "DDIMScheduler or DDPMScheduler, found a PNDMScheduler"),
        ({"scheduler": {"prediction_type": "flow"}}, "epsilon, sample, v_prediction, found 'flow'"),
        ({"scheduler": {"beta_min": 0.1}}, r"DDIMScheduler has no argument 'beta_min'\. It has num_train_timesteps"),
        ({"scheduler": {"beta_schedule": "cubic"}}, "DDIMScheduler cannot be built .* cubic"),
        ({"scheduler": "nowhere"}, r"No scheduler_config\.json in '.*/nowhere' or '.*/nowhere/scheduler'"),
        ({"network": {"up_block_types": ["UpBlock2D"] * 2}}, "UNet2DModel cannot be built .* same number"),
        ({"sampling_steps": 1001}, r"sampling_steps in 1\.\.1000, the .* sampling_steps=1001"),
        ({"padding": -1}, "padding=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"network": {"sample_size": None}}, "no sample_size"),
        ({"pipeline": __file__}, "is a file. Write pipeline=FOLDER"),
    ],
)
def test_other_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        diffusion(**arguments)


def test_another_pipeline_in_its_place_is_refused_before_the_training(tmp_path: Path) -> None:
    module = diffusion(pipeline=str(tmp_path))
    theirs = tmp_path / "model_index.json"
    theirs.write_text("{}")
    with pytest.raises(ConfigurationError, match=r"contains model_index\.json, which saving would overwrite"):
        trainer(tmp_path / "logs").fit(module, loader())
    assert theirs.read_text() == "{}"


def test_other_networks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Expected a UNet2DModel of diffusers, found a Conv2d"):
        ImageDiffusion(nn.Conv2d(1, 1, 1))
    with pytest.raises(ConfigurationError, match=r"No config\.json in '.*/nowhere' or '.*/nowhere/unet'"):
        ImageDiffusion("nowhere")


RECIPES = [name for name in names() if name.startswith("diffusion/")]


def test_there_is_a_recipe_for_each_of_the_data_sets() -> None:
    assert RECIPES == ["diffusion/cifar10.yaml", "diffusion/digits.yaml", "diffusion/fashion_mnist.yaml"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_instantiated_with_images_from_minus_one_to_one(name: str, tmp_path: Path) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert describe(name)
    assert f"lightning-quant fit --config {name}" in text
    config = yaml.safe_load(text)
    assert config["data"]["class_path"] in ("CIFARDataModule", "DigitsDataModule", FashionMNISTDataModule.__name__)
    cli = build(["--config", str(FOLDER / name), "--trainer.accelerator=cpu", "--trainer.precision=32-true"], run=False)
    assert isinstance(cli.model, ImageDiffusion)
    assert set(cli.datamodule.mean) == set(cli.datamodule.std) == {0.5}
    assert cli.model.image_shape[0] == len(cli.datamodule.mean)
    assert cli.model.pipeline == Path.cwd() / config["model"]["init_args"]["pipeline"]
    # 16 MB of float32 at most.
    assert sum(parameter.numel() for parameter in cli.model.parameters()) < 4e6
    averages = [each for each in cli.trainer.callbacks if isinstance(each, EMAWeightAveraging)]  # type: ignore[attr-defined]
    assert len(averages) == 1


def test_the_recipe_for_digits_leaves_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    build(["fit", "--config", str(FOLDER / "diffusion/digits.yaml"), "--trainer.logger=false", *short])
    module = ImageDiffusion("digits_ddim", "digits_ddim", sampling_steps=2)
    assert module.generate(torch.tensor([0])).shape == (1, 1, 8, 8)
    assert module.network.config.block_out_channels == [32, 64]
