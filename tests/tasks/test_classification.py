import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.data import DigitsDataModule
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.tasks import ImageClassifier

_GREY = {"in_chans": 1}


def _classifier(**arguments: Any) -> ImageClassifier:
    return ImageClassifier(**{"num_classes": 10, "model_kwargs": _GREY, **arguments})


def _trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"default_root_dir": folder, "accelerator": "cpu", "max_steps": 3, **quiet, **arguments})


def _loader(images: int = 8, classes: int = 10, channels: int = 1, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, channels, 8, 8, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    return DataLoader(TensorDataset(pixels, labels), batch_size=batch_size)


def test_learns_the_digits(tmp_path: Path) -> None:
    seed_everything(0)
    classifier, data = _classifier(lr_scheduler="one_cycle"), DigitsDataModule()
    trainer = _trainer(tmp_path, max_steps=-1, max_epochs=2, enable_checkpointing=False)
    trainer.fit(classifier, data)
    (result,) = trainer.test(classifier, data, verbose=False)
    assert result["test/acc"] > 0.85
    assert result["test/acc5"] >= result["test/acc"]


def test_checkpoint_is_safe_to_load_and_rebuilds_the_classifier_alone(tmp_path: Path) -> None:
    weights = tmp_path / "first.safetensors"
    safetensors.torch.save_file(_classifier().network.state_dict(), weights)
    classifier = _classifier(checkpoint_path=str(weights), lr_scheduler="cosine", channels_last=True)
    trainer = _trainer(tmp_path)
    trainer.fit(classifier, _loader())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    weights.unlink()
    stored = torch.load(path, weights_only=True)
    assert not stored["hyper_parameters"].keys() & {
        "optimizer",
        "lr_scheduler",
        "checkpoint_path",
        "pretrained",
    }
    loaded = ImageClassifier.load_from_checkpoint(path).eval()
    assert loaded.channels_last
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(images), classifier.eval()(images))


def test_resuming_continues_optimizer_and_schedule(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> Trainer:
        seed_everything(1)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = _trainer(tmp_path, max_epochs=epochs, max_steps=-1, callbacks=[keep])
        trainer.fit(_classifier(lr_scheduler=lambda o: MultiStepLR(o, [2])), _loader(), ckpt_path=resume)
        return trainer

    run(2)
    resumed, whole = run(4, tmp_path / "epoch=1.ckpt"), run(4)
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(left, right)


def test_default_optimizer_is_the_recipes() -> None:
    optimizer = _classifier().configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 1e-4)


def test_accuracies_are_shares_of_all_images_however_batches_fall(tmp_path: Path) -> None:
    classifier = _classifier()
    results = [_trainer(tmp_path).test(classifier, _loader(50, batch_size=size), verbose=False)[0] for size in (7, 50)]
    images, labels = next(iter(_loader(50, batch_size=50)))
    ranks = (classifier.eval()(images).argsort(descending=True) == labels[:, None]).float()
    for result in results:
        assert result["test/acc"] == pytest.approx(ranks[:, 0].mean().item())
        assert result["test/acc5"] == pytest.approx(ranks[:, :5].sum(1).mean().item())
        assert result["test/loss"] == pytest.approx(F.cross_entropy(classifier(images), labels).item(), abs=1e-5)


def test_few_classes_have_no_top_five(tmp_path: Path) -> None:
    classifier = _classifier(num_classes=4)
    (result,) = _trainer(tmp_path).validate(classifier, _loader(classes=4), verbose=False)
    assert result.keys() == {"val/loss", "val/acc"}


def test_predictions_are_probabilities_with_or_without_labels() -> None:
    classifier = _classifier().eval()
    images, labels = next(iter(_loader()))
    probabilities = classifier.predict_step((images, labels), 0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    assert torch.equal(probabilities.argmax(1), classifier(images).argmax(1))
    assert torch.equal(probabilities, classifier.predict_step(images, 0))


def _training_loss(classifier: ImageClassifier, batch: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr(classifier, "log", lambda *_, **__: None)
    return classifier.training_step(batch, 0)


def test_label_smoothing_spreads_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = _classifier(label_smoothing=0.2).train()
    images, labels = next(iter(_loader()))
    loss = _training_loss(classifier, (images, labels), monkeypatch)
    target = F.one_hot(labels, 10) * 0.8 + 0.02
    torch.testing.assert_close(loss, -(target * classifier(images).log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_mixing_is_timms_and_leaves_the_batch_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = _classifier(**{kind: 0.8, "label_smoothing": 0.1}).train()
    images, labels = next(iter(_loader()))
    before = images.clone()
    seed_everything(0)
    loss = _training_loss(classifier, (images, labels), monkeypatch)
    assert torch.equal(images, before)
    seed_everything(0)
    mixed, target = classifier.mixup(images.clone(), labels)  # type: ignore[misc]
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(classifier(mixed), target))  # type: ignore[no-untyped-call]


def test_mixing_an_odd_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = next(iter(_loader(batch_size=3)))
    with pytest.raises(ConfigurationError, match="found a training batch of 3"):
        _training_loss(_classifier(mixup_alpha=0.8), (images, labels), monkeypatch)


def test_channels_last_changes_the_layout_and_not_the_logits() -> None:
    plain, last = _classifier(model_kwargs={}), _classifier(model_kwargs={}, channels_last=True)
    last.load_state_dict(plain.state_dict())
    seen: list[torch.Tensor] = []
    last.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(last.eval()(images), plain.eval()(images), atol=1e-4, rtol=1e-4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    weight = last.network.layer1[0].conv1.weight  # type: ignore[index,union-attr]
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "ckpt"])
def test_starts_from_a_local_file(suffix: str, tmp_path: Path) -> None:
    source = _classifier()
    path = tmp_path / f"weights.{suffix}"
    match suffix:
        case "safetensors":
            safetensors.torch.save_file(source.network.state_dict(), path)
        case "pth":
            torch.save({"model": source.network.state_dict()}, path)
        case _:
            trainer = _trainer(tmp_path)
            trainer.strategy.connect(source)
            trainer.save_checkpoint(path, weights_only=True)
    loaded = _classifier(checkpoint_path=str(path))
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(_classifier().network.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"does not hold the weights of cifar_resnet32(.|\n)*Missing key"):
        _classifier(model="cifar_resnet32", checkpoint_path=str(path))
    with pytest.raises(CheckpointError, match=r"linear\.weight"):
        _classifier(num_classes=7, checkpoint_path=str(path))


def _own() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_a_network_from_python_is_given_again_to_load_its_checkpoint(tmp_path: Path) -> None:
    classifier = _classifier(model=_own(), model_kwargs=None)
    trainer = _trainer(tmp_path)
    trainer.fit(classifier, _loader())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    assert "model" not in torch.load(path, weights_only=True)["hyper_parameters"]
    loaded = ImageClassifier.load_from_checkpoint(path, model=_own())
    images, _ = next(iter(_loader()))
    assert torch.equal(loaded(images), classifier(images))
    with pytest.raises(CheckpointError, match=r"network is a Sequential passed from Python.*model=NETWORK"):
        ImageClassifier.load_from_checkpoint(path)
    tested = _trainer(tmp_path).test(_classifier(model=_own(), model_kwargs=None), _loader(), ckpt_path=path)
    assert tested == _trainer(tmp_path).test(classifier, _loader(), verbose=False)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"model": "cifar_resnet21"}, "no network 'cifar_resnet21'. Near: .*cifar_resnet20"),
        ({"checkpoint_path": "nowhere.pth"}, "No file '.*nowhere.pth'"),
        ({"num_classes": 1}, "num_classes >= 2.*found 1,"),
        ({"label_smoothing": 1.0}, "found 10, 1.0"),
        ({"mixup_alpha": -1.0}, "-1.0 and 0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        _classifier(**arguments)


def test_data_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data has 10 classes, the network 7\. Write num_classes=10"):
        _trainer(tmp_path).fit(_classifier(num_classes=7), DigitsDataModule())


_CONFIG = """
model:
  class_path: lightning_quant.tasks.ImageClassifier
  init_args:
    model_kwargs: {in_chans: 1}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.MultiStepLR, init_args: {milestones: [80, 120]}}
data: {class_path: lightning_quant.data.DigitsDataModule}
trainer: {max_steps: 1, limit_val_batches: 0, accelerator: cpu, logger: false, enable_progress_bar: false}
"""


@pytest.mark.parametrize("schedule", ["MultiStepLR", "one_cycle"])
def test_a_config_drives_it_and_is_written_back_as_it_was(schedule: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(_CONFIG)
    arguments = ["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path / 'run'}"]
    if schedule == "one_cycle":
        arguments.append("--model.init_args.lr_scheduler=one_cycle")
    cli = LightningCLI(args=arguments)
    optimizer: Optimizer = cli.trainer.optimizers[0]
    assert optimizer.defaults["lr"] == 0.05
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert type(scheduler).__name__ == {"one_cycle": "OneCycleLR"}.get(schedule, schedule)
    written = ["fit", "--config", str(tmp_path / "run" / "config.yaml")]
    again = LightningCLI(args=[*written, f"--trainer.default_root_dir={tmp_path / 'again'}"])
    assert again.config.fit.model == cli.config.fit.model
    path = tmp_path / "cli.ckpt"
    cli.trainer.save_checkpoint(path)
    assert ImageClassifier.load_from_checkpoint(path).hparams["model_kwargs"] == _GREY


@pytest.mark.real
def test_published_resnet20_weights_reach_their_published_error(tmp_path: Path) -> None:
    assets = Path(os.environ.get("LIGHTNING_QUANT_ASSETS", ""))
    weights, root = assets / "resnet20_cifar10.safetensors", assets / "cifar10"
    if not weights.is_file() or not (root / "test").is_dir():
        pytest.skip(
            "needs $LIGHTNING_QUANT_ASSETS/cifar10/test as class folders of PNGs and "
            "$LIGHTNING_QUANT_ASSETS/resnet20_cifar10.safetensors, the weights of ResNet-20 from "
            "github.com/akamaster/pytorch_resnet_cifar10 without their 'module.' prefix"
        )
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = ImageFolder(str(root / "test"), transforms.Compose([transforms.ToTensor(), normalize]))
    classifier = ImageClassifier(checkpoint_path=str(weights), model_kwargs={"head_norm": False})
    (result,) = _trainer(tmp_path).test(classifier, DataLoader(images, batch_size=250), verbose=False)
    assert result["test/acc"] == pytest.approx(1 - 0.0827, abs=0.0005)
