"""Calibration images from Trainers, DataModules and loaders of all kinds."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, random_split
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder

from helpers.networks import Images, SmallNet, trainer
from lightning_quant.calibration import calibration_source
from lightning_quant.calibration.image_source import CalibrationSource, from_trainer
from lightning_quant.calibration.images import calibration_images, images_of
from lightning_quant.data import DigitsDataModule
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.utilities.hashing import fingerprint

EVALUATION = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)])
AUGMENTING = transforms.Compose([transforms.RandomHorizontalFlip(), EVALUATION, transforms.RandomErasing(p=1.0)])


class Dicts(Images):
    """Items as dicts."""

    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Images in an order, without length."""

    def __init__(self, count: int = 32) -> None:
        self.kept = Images(count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.kept[index] for index in range(len(self.kept)))


class Folders(pl.LightningDataModule):
    """A user's DataModule: augmented training images, everything made in setup, as Lightning's guide has it."""

    def __init__(self, root: Path, fraction: float = 0.0) -> None:
        super().__init__()
        self.root, self.fraction = root, fraction
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        if stage == "fit":
            self.train = ImageFolder(str(self.root), AUGMENTING)
        if stage == "test":
            self.test = ImageFolder(str(self.root), EVALUATION)

    def train_dataloader(self) -> DataLoader[Any]:
        dataset: Any = self.train
        if self.fraction:
            halves = random_split(dataset, [0.5, 0.5], torch.Generator().manual_seed(0))
            dataset, _ = random_split(halves[0], [self.fraction, 1 - self.fraction], torch.Generator().manual_seed(1))
        return DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(10):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


def over(dataset: Any, **arguments: Any) -> CalibrationSource:
    return CalibrationSource(DataLoader(dataset, **{"batch_size": 4, **arguments}), "a test")


def rows(images: Tensor) -> list[str]:
    return [fingerprint(image) for image in images]


def plain(root: Path) -> set[str]:
    return {fingerprint(image) for image, _ in ImageFolder(str(root), EVALUATION)}


# -- the draw ----------------------------------------------------------------------------------------------------


def test_a_draw_is_without_replacement_and_follows_the_seed() -> None:
    first, again, other = (rows(calibration_images(over(Images()), 16, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(set(first)) == 16
    assert set(first) <= set(rows(Images().images))
    assert first != rows(Images().images[:16])


def test_a_smaller_draw_starts_the_larger_one() -> None:
    assert rows(calibration_images(over(Images()), 9)) == rows(calibration_images(over(Images()), 32))[:9]


@pytest.mark.parametrize("dataset", [Images(), Stream()], ids=["indexed", "stream"])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_ranks_together_have_the_draw_of_one(dataset: Any, ranks: int) -> None:
    whole = rows(calibration_images(over(dataset), 17))
    parts = [rows(calibration_images(over(dataset), 17, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert [whole[rank::ranks] for rank in range(ranks)] == parts


@pytest.mark.parametrize("ranks", [1, 3])
def test_random_transforms_depend_on_the_image_and_the_seed_alone(root: Path, ranks: int) -> None:
    dataset = ImageFolder(str(root), AUGMENTING)
    expected = rows(calibration_images(over(dataset), 12))[ranks - 1 :: ranks]
    for arguments in ({"batch_size": 1}, {"batch_size": 5}, {"num_workers": 2}):
        torch.rand(1)
        assert rows(calibration_images(over(dataset, **arguments), 12, rank=ranks - 1, ranks=ranks)) == expected
    assert rows(calibration_images(over(dataset), 12, seed=1)) != expected


def test_random_transforms_differ_from_image_to_image() -> None:
    class Noise(Dataset[Tensor]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(1, 2, 2)

    assert len(set(rows(calibration_images(over(Noise()), 20)))) == 20


def test_the_random_numbers_of_the_caller_go_on_undisturbed(root: Path) -> None:
    def draws() -> tuple[Any, ...]:
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002

    pl.seed_everything(3, verbose=False)
    expected = draws()
    pl.seed_everything(3, verbose=False)
    calibration_images(over(ImageFolder(str(root), AUGMENTING), num_workers=1), 12)
    assert draws() == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 5, "drop_last": True, "shuffle": True},
        {"batch_size": 1, "batch_sampler": [[0, 1, 2], [3]]},
        {"batch_size": 64},
    ],
    ids=["dropping", "batch_sampler", "one batch"],
)
def test_neither_samplers_nor_batches_decide_what_is_drawn(arguments: dict[str, Any]) -> None:
    assert rows(calibration_images(over(Images(), **arguments), 32)) == rows(calibration_images(over(Images()), 32))


def test_the_collate_function_is_the_users() -> None:
    def doubled(items: list[tuple[Tensor, Tensor]]) -> Tensor:
        return 2 * torch.stack([image for image, _ in items])

    found = calibration_images(over(Images(), collate_fn=doubled), 5)
    assert torch.equal(found, 2 * calibration_images(over(Images()), 5))


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_stream_gives_its_first_images_the_last_batch_included(drop_last: bool) -> None:
    found = calibration_images(over(Stream(10), drop_last=drop_last), 10)
    assert torch.equal(found, Images(10).images)


def test_any_iterable_of_batches_will_do() -> None:
    batches = [(Images().images[start : start + 5], None) for start in range(0, 30, 5)]
    assert torch.equal(calibration_images(CalibrationSource(batches, "a list"), 12), Images().images[:12])


@pytest.mark.parametrize("dataset", [Images(20), Stream(20)], ids=["indexed", "stream"])
def test_fewer_images_than_asked_are_refused(dataset: Any) -> None:
    assert len(calibration_images(over(dataset), 20)) == 20
    with pytest.raises(
        ConfigurationError,
        match=r"Requested 21 calibration images, but found 20 in a test. Write calibration_images=20",
    ):
        calibration_images(over(dataset), 21)


@pytest.mark.parametrize(("count", "rank", "ranks"), [(0, 0, 1), (3, 0, 4), (8, 4, 4), (8, -1, 2)])
def test_every_rank_needs_an_image(count: int, rank: int, ranks: int) -> None:
    with pytest.raises(ConfigurationError, match=f"Requested {count} .*on {ranks} ranks, of which this is rank {rank}"):
        calibration_images(over(Images()), count, rank=rank, ranks=ranks)


def ragged(items: list[Any]) -> Any:
    return tuple(zip(*items, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 4, "num_workers": 1}, {"collate_fn": ragged}],
    ids=["each alone", "in a batch", "in a worker", "in lists"],
)
def test_images_of_several_sizes_are_refused(arguments: dict[str, Any]) -> None:
    images = [(torch.zeros(3, 8 + index % 2, 8), 0) for index in range(8)]
    with pytest.raises(ConfigurationError, match=r"different sizes: .*\D9, 8\D.*resizes and crops"):
        calibration_images(over(images, **arguments), 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(value: float) -> None:
    images = Images()
    images.images[5, 0, 3, 3] = value
    with pytest.raises(QuantizationError, match=r"1 of \d+ pixels of a calibration batch are NaN or infinite"):
        calibration_images(over(images), 32)


def test_a_collate_function_that_drops_images_is_refused() -> None:
    def dropping(items: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([image for image, _ in items[1:]])

    with pytest.raises(ConfigurationError, match="Drew 8 items from a test, but its batches hold 6 images"):
        calibration_images(over(Images(), collate_fn=dropping), 8)


# -- the images of a batch ---------------------------------------------------------------------------------------

IMAGES = Images(4).images


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, torch.arange(4)),
        [IMAGES],
        [list(IMAGES), [{"boxes": torch.zeros(1, 4)}]],
        *({"label": torch.arange(4), key: IMAGES} for key in ("image", "images", "pixel_values", "img", "x", "input")),
    ],
)
def test_images_are_found_where_data_sets_put_them(batch: Any) -> None:
    assert torch.equal(images_of(batch), IMAGES)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"pixels": IMAGES}, r"a dict with 'pixels': float32 \(4, 3, 8, 8\)"),
        ((torch.arange(4), IMAGES), r"a tuple of int64 \(4,\), float32"),
        ((IMAGES * 0).to(torch.uint8), r"uint8 \(4, 3, 8, 8\)"),
        (IMAGES.flatten(1), r"float32 \(4, 192\)"),
        ([], "a list of nothing"),
        ("text", "a str"),
    ],
)
def test_a_batch_without_images_is_described(batch: Any, found: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Found {found}.*Write images=FUNCTION"):
        images_of(batch)


def test_a_function_finds_images_where_none_are_expected() -> None:
    found = calibration_images(over(Dicts()), 8, images=lambda batch: 2 * batch["pixel_values"])
    assert torch.equal(found, 2 * calibration_images(over(Images()), 8))
    assert rows(calibration_images(over(Dicts()), 8)) == rows(calibration_images(over(Images()), 8))


def test_a_fingerprint_sees_every_bit_the_shape_and_the_type() -> None:
    changed = IMAGES.clone()
    changed.view(torch.int32)[3, 2, 7, 7] ^= 1
    others = [changed, IMAGES.flip(0), IMAGES.reshape(8, 3, 4, 8), IMAGES.double(), IMAGES.bfloat16()]
    assert len({fingerprint(each) for each in [IMAGES, *others]}) == 6
    assert fingerprint(IMAGES.clone(memory_format=torch.channels_last)) == fingerprint(IMAGES)


# -- where they come from ----------------------------------------------------------------------------------------


class Recorder(pl.Callback):
    """Draws when a verb starts."""

    def __init__(self, count: int = 10, data: Any = None) -> None:
        self.count, self.data = count, data

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.source = from_trainer(trainer, pl_module, self.data)
        self.images = calibration_images(self.source, self.count)

    on_validation_start = on_predict_start = on_train_start = on_test_start


def test_our_datamodules_give_training_images_as_evaluation_sees_them() -> None:
    data = DigitsDataModule()
    images = calibration_images(calibration_source(datamodule=data), 50)
    training = rows(torch.stack([image for image, _ in data.calibration_dataset()]))  # type: ignore[attr-defined]
    assert set(rows(images)) <= set(training)


@pytest.mark.parametrize("fraction", [0.0, 0.8])
def test_test_takes_the_train_split_with_the_evaluation_transform(root: Path, fraction: float) -> None:
    look, data = Recorder(count=8), Folders(root, fraction)
    trainer(look).test(SmallNet(), data, verbose=False)
    assert data.stages == ["test", "fit"]
    assert set(rows(look.images)) <= plain(root)
    assert look.source.origin == "the train split (ImageFolder), with the evaluation transform"
    assert data.train.transform is AUGMENTING  # the user's objects stay as they are
    if fraction:
        kept: Any = data.train_dataloader().dataset
        folder = ImageFolder(str(root), EVALUATION)
        inside = {fingerprint(folder[kept.dataset.indices[index]][0]) for index in kept.indices}
        assert set(rows(look.images)) <= inside
        assert len(inside) < len(plain(root)) / 2


def test_a_datamodule_that_is_set_up_is_not_set_up_again(root: Path) -> None:
    data = Folders(root)
    data.setup("fit")
    calibration_source(datamodule=data)
    assert data.stages == ["fit"]


def test_without_evaluation_data_of_the_same_class_the_training_transform_stays(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = DataLoader(ImageFolder(str(root), AUGMENTING), batch_size=4)
    with caplog.at_level("INFO"):
        source = calibration_source(train_loaders=train, evaluation_loaders=DataLoader(FakeData(4, (3, 8, 8))))
    assert "ImageFolder), with the training transform, since no evaluation data of the same class" in caplog.text
    assert source.origin == "the train split (ImageFolder), with the training transform"
    assert not set(rows(calibration_images(source, 10))) & plain(root)


def test_transforms_of_any_torchvision_data_set_are_exchanged() -> None:
    train = FakeData(12, (3, 8, 8), transform=AUGMENTING)
    held_out = FakeData(4, (3, 8, 8), transform=EVALUATION)
    source = calibration_source(train_loaders=DataLoader(train), evaluation_loaders=[DataLoader(held_out)])
    exchanged: Any = source.loader.dataset  # type: ignore[union-attr]
    assert exchanged.transform is EVALUATION
    assert exchanged.transforms is held_out.transforms
    assert len(exchanged) == 12
    assert train.transform is AUGMENTING


def test_images_that_a_sampler_holds_out_are_not_drawn() -> None:
    train = DataLoader(Images(), batch_size=4, sampler=SubsetRandomSampler(range(0, 32, 2)))
    images = calibration_images(calibration_source(train_loaders=train), 16)
    assert sorted(rows(images)) == sorted(rows(Images().images[::2]))


def test_a_module_with_loaders_of_its_own_needs_no_datamodule() -> None:
    look = Recorder()
    trainer(look).test(SmallNet(), verbose=False)
    assert look.source.origin == "the train split (Images), with the training transform"


class WithoutLoaders(SmallNet):
    """Gets its loaders from the Trainer."""

    train_dataloader = pl.LightningModule.train_dataloader  # type: ignore[assignment]
    val_dataloader = pl.LightningModule.val_dataloader  # type: ignore[assignment]
    test_dataloader = pl.LightningModule.test_dataloader  # type: ignore[assignment]


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_evaluation_images_are_the_last_resort_and_warned_of(verb: str) -> None:
    look = Recorder()
    with pytest.warns(UserWarning, match=r"no train split, so calibration images are taken from the evaluation data"):
        getattr(trainer(look), verb)(WithoutLoaders(), DataLoader(Images(), batch_size=4), verbose=False)
    assert set(rows(look.images)) <= set(rows(Images().images))


def test_fit_takes_the_loader_that_it_trains_on() -> None:
    look = Recorder()
    trainer(look, limit_train_batches=1).fit(WithoutLoaders(), DataLoader(Stream(), batch_size=4))
    assert torch.equal(look.images, Images().images[:10])


@pytest.mark.parametrize("data", [Images(12).images, Images(12), DataLoader(Images(12), batch_size=5)])
def test_given_data_go_before_all_other(data: Any) -> None:
    look = Recorder(count=12, data=data)
    trainer(look).test(SmallNet(), DigitsLike(), verbose=False)
    assert sorted(rows(look.images)) == sorted(rows(Images(12).images))


class DigitsLike(pl.LightningDataModule):
    """Loads bytes and normalizes them in Lightning's batch hook."""

    def train_dataloader(self) -> DataLoader[Any]:
        pixels = (torch.arange(40).view(40, 1, 1, 1).expand(40, 3, 8, 8)).to(torch.uint8)
        return DataLoader([(image, 0) for image in pixels], batch_size=4)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].float() / 40, batch[1]] if batch[0].dtype == torch.uint8 else batch


def test_batches_pass_lightnings_hooks_first() -> None:
    look = Recorder(count=40)
    trainer(look).test(WithoutLoaders(), DigitsLike(), verbose=False)
    assert torch.equal(look.images[:, 0, 0, 0].sort().values, torch.arange(40) / 40)


def test_given_batches_pass_the_hooks_too_and_given_images_do_not() -> None:
    look = Recorder(count=40, data=DigitsLike().train_dataloader())
    trainer(look).test(WithoutLoaders(), DigitsLike(), verbose=False)
    assert torch.equal(look.images[:, 0, 0, 0].sort().values, torch.arange(40) / 40)
    plain = Recorder(count=12, data=Images(12).images)
    trainer(plain).test(WithoutLoaders(), Doubling(), verbose=False)
    assert sorted(rows(plain.images)) == sorted(rows(Images(12).images))


class Doubling(DigitsLike):
    """Its hook changes images too."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]


class Broken(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        if stage == "fit":
            raise FileNotFoundError("no train folder")

    def train_dataloader(self) -> Any:
        return DataLoader(None)  # type: ignore[arg-type]


def test_a_train_split_that_cannot_be_loaded_says_what_to_write() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"Broken.train_dataloader\(\), which raised FileNotFoundError: no train folder. Write calibration_data=",
    ):
        calibration_source(datamodule=Broken())


def test_nothing_to_calibrate_on_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"Found no images to calibrate on.*Write calibration_data=DATASET"):
        calibration_source(module=WithoutLoaders(), evaluation_loaders=[None])


def test_calibration_data_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="calibration_data is a str, but expected a Dataset, a DataLoader"):
        calibration_source("imagenet")  # type: ignore[arg-type]


def test_the_dataset_is_read_no_more_often_than_images_are_drawn() -> None:
    class Counting(Dataset[Tensor]):
        read = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Tensor:
            Counting.read += 1
            return torch.zeros(3, 8, 8)

    calibration_images(over(Counting()), 10, rank=1, ranks=2)
    assert Counting.read == 5
