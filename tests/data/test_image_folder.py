from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import get_pretrained_cfg
from torch.utils.data import DataLoader

from lightning_quant.data import ImageFolderDataModule
from lightning_quant.errors import ConfigurationError

_GREY = {"cat": 40, "dog": 120, "owl": 200}


def _write(root: Path, split: str, number: int) -> None:
    for name, gray in _GREY.items():
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(number):
            image = Image.new("RGB", (48, 40), (gray, gray, gray))
            image.paste((25 * index, 0, 0), (20, 16, 28, 24))
            image.save(folder / f"{index}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _write(tmp_path, "train", 10)
    _write(tmp_path, "val", 2)
    return tmp_path


def _module(root: Path, **arguments: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **{"image_size": 32, "num_workers": 0, "batch_size": 8, **arguments})


def _dataset(loader: Any) -> Any:
    return loader.dataset


def _size(loader: Any) -> int:
    return len(_dataset(loader))


def test_batches_have_the_size_and_labels_asked_for(root: Path) -> None:
    data = _module(root)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    assert data.num_classes == 3
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_evaluation_normalises_with_mean_and_std(root: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    image, label = _module(root, mean=mean, std=std, crop_pct=1.0).calibration_dataset()[25]
    assert label == 2
    expected = (torch.full((3,), 200 / 255) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(image[:, 0, 0], expected)


def test_calibration_is_repeatable_and_training_is_not(root: Path) -> None:
    data = _module(root, random_erasing=1.0)
    splits = data.calibration_dataset(), data.train_dataloader().dataset
    first, second = ([split[3][0] for split in splits] for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_augmentation_is_timms(root: Path) -> None:
    plain, rich = _module(root), _module(root, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
    assert "RandAugment" not in repr(plain.train_transform())
    assert "RandAugment" in repr(rich.train_transform())
    assert "RandomErasing" in repr(rich.train_transform())
    assert "bicubic" in repr(_module(root, interpolation="bicubic").evaluation_transform())


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224.augreg_in21k_ft_in1k", "deit_small_patch16_224.fb_in1k", "resnet50.a1_in1k"]
)
def test_evaluation_can_be_a_pretrained_networks_own(name: str, root: Path) -> None:
    cfg: Any = get_pretrained_cfg(name)
    published = resolve_data_config(pretrained_cfg=cfg.to_dict())
    arguments = {key: published[key] for key in ("interpolation", "crop_pct", "mean", "std")}
    data = _module(root, image_size=published["input_size"][-1], **arguments)
    assert repr(data.evaluation_transform()) == repr(create_transform(**published))


def test_evaluation_resizes_by_the_crop_and_cuts_the_centre(root: Path) -> None:
    resize, crop = _module(root, image_size=224, crop_pct=0.9).evaluation_transform().transforms[:2]
    assert (resize.size, crop.size) == (248, (224, 224))  # floor(224 / 0.9)


def test_by_default_val_validates_and_tests(root: Path) -> None:
    data = _module(root)
    assert [_size(loader) for loader in (data.train_dataloader(), data.val_dataloader())] == [30, 6]
    assert _size(data.test_dataloader()) == 6


def test_a_test_folder_tests(root: Path) -> None:
    _write(root, "test", 4)
    assert _size(_module(root).test_dataloader()) == 12
    assert _size(_module(root).predict_dataloader()) == 12


def test_a_held_out_share_validates_instead_and_val_tests(root: Path) -> None:
    data = _module(root, validation_fraction=0.2)
    assert [_size(loader) for loader in (data.train_dataloader(), data.val_dataloader())] == [24, 6]
    assert _size(data.test_dataloader()) == 6
    datasets: list[Any] = [data.calibration_dataset(), _dataset(data.val_dataloader())]
    kept, held = ({(image.numpy().tobytes(), label) for image, label in dataset} for dataset in datasets)
    assert len(kept | held) == 30
    assert len(held) == 6


def test_loading_in_workers_gives_the_same_images(root: Path) -> None:
    here, there = (
        torch.cat([images for images, _ in _module(root, num_workers=workers).test_dataloader()]) for workers in (0, 1)
    )
    assert torch.equal(here, there)


def test_calibration_order_is_the_order_on_disk(root: Path) -> None:
    loader = DataLoader(_module(root).calibration_dataset(), batch_size=30)
    assert next(iter(loader))[1].tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_a_missing_root_says_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match=r"No class folders in '.*/nowhere/train': found no such folder"):
        ImageFolderDataModule("nowhere").prepare_data()


def test_a_missing_val_offers_a_held_out_share(tmp_path: Path) -> None:
    _write(tmp_path, "train", 10)
    with pytest.raises(ConfigurationError, match=r"in '.*val': .*parent folder has 'train'.*validation_fraction=0.1"):
        _module(tmp_path).setup("fit")
    data = _module(tmp_path, validation_fraction=0.1)
    assert _size(data.val_dataloader()) == 3
    with pytest.raises(ConfigurationError, match=r"Nothing to test on in '.*': found 'train'"):
        data.setup("test")


def test_other_classes_in_val_are_refused(root: Path) -> None:
    (root / "val" / "fox").mkdir()
    with pytest.raises(ConfigurationError, match=r"only one of them has \['fox'\]"):
        _module(root).prepare_data()


def test_a_class_without_images_is_refused(root: Path) -> None:
    for image in (root / "train" / "owl").iterdir():
        image.unlink()
    with pytest.raises(ConfigurationError, match="owl"):
        _module(root).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"validation_fraction": 1.0}, r"validation_fraction in \[0, 1\), but found 1.0"),
        ({"random_erasing": 2.0}, r"random_erasing in \[0, 1\], but found 2.0"),
        ({"crop_pct": 0.0}, r"crop_pct in \(0, 1\], but found 0.0"),
        ({"image_size": 0}, "image_size >= 1, but found 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        _module(Path("anywhere"), **arguments)
