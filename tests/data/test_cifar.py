import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import cifar

from lightning_quant.data import CIFARDataModule
from lightning_quant.errors import ConfigurationError

_CLASSES = [f"class{index}" for index in range(10)]


def _pixels(label: int, index: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([label, index]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Ten classes of four training and two test images."""
    for split, number in (("train", 4), ("test", 2)):
        for label, name in enumerate(_CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                Image.fromarray(_pixels(label, index)).save(folder / f"{index}.png")
    return tmp_path


@pytest.fixture
def pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images of `folders`, in the same order, as torchvision stores them."""
    root = tmp_path / "pickled"
    folder = root / cifar.CIFAR10.base_folder
    folder.mkdir(parents=True)
    files = [name for name, _ in cifar.CIFAR10.train_list]
    for name, numbers in [*zip(files, [range(4), [], [], [], []], strict=True), ("test_batch", range(2))]:
        pairs = [(label, index) for label in range(10) for index in numbers]
        rows = [_pixels(label, index).transpose(2, 0, 1).ravel() for label, index in pairs]
        data = np.stack(rows) if rows else np.empty((0, 3072), np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [label for label, _ in pairs]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": _CLASSES}))
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    return root


def _all(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = next(iter(DataLoader(dataset, batch_size=1000)))
    return images, labels


def test_folders_are_read_in_order_with_the_normalisation_of_cifar(folders: Path) -> None:
    data = CIFARDataModule(str(folders), validation_images=0)
    images, labels = _all(data.calibration_dataset())
    assert labels.tolist() == [label for label in range(10) for _ in range(4)]
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = (torch.from_numpy(_pixels(7, 2)) / 255 - mean) / std
    torch.testing.assert_close(images[30], expected.permute(2, 0, 1))


def test_both_layouts_give_the_same_images(folders: Path, pickles: Path) -> None:
    left, right = (CIFARDataModule(str(root), validation_images=0) for root in (folders, pickles))
    for a, b in zip(_all(left.calibration_dataset()), _all(right.calibration_dataset()), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(next(iter(left.test_dataloader())), next(iter(right.test_dataloader())), strict=True):
        assert torch.equal(a, b)


def test_training_augments_and_calibration_does_not(folders: Path) -> None:
    data = CIFARDataModule(str(folders), validation_images=10, batch_size=30)
    assert torch.equal(_all(data.calibration_dataset())[0], _all(data.calibration_dataset())[0])
    first, second = (next(iter(data.train_dataloader())) for _ in range(2))
    assert first[0].shape == (30, 3, 32, 32)
    assert sorted(first[1].tolist()) == sorted(second[1].tolist())
    assert not torch.equal(first[0].sort(dim=0).values, second[0].sort(dim=0).values)


def test_held_out_images_are_not_calibration_images(folders: Path) -> None:
    data = CIFARDataModule(str(folders), validation_images=10)
    held, labels = next(iter(data.val_dataloader()))
    kept, _ = _all(data.calibration_dataset())
    assert torch.bincount(labels).tolist() == [1] * 10
    rows = {image.numpy().tobytes() for image in torch.cat([held, kept])}
    assert len(rows) == 40


def test_predict_and_test_serve_the_test_images_in_order(folders: Path) -> None:
    data = CIFARDataModule(str(folders), validation_images=0)
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert next(iter(loader))[1].tolist() == [label for label in range(10) for _ in range(2)]


def test_without_augmentation_training_sees_the_calibration_images(folders: Path) -> None:
    data = CIFARDataModule(str(folders), validation_images=0, batch_size=40, augment=False)
    images, _ = next(iter(data.train_dataloader()))
    rows = {image.numpy().tobytes() for image in images}
    assert rows == {image.numpy().tobytes() for image in _all(data.calibration_dataset())[0]}


def test_without_crops_training_images_are_flipped_or_as_they_are(folders: Path) -> None:
    data = CIFARDataModule(
        str(folders), validation_images=0, batch_size=40, crop_padding=0, mean=[0.5] * 3, std=[0.5] * 3
    )
    plain = _all(data.calibration_dataset())[0]
    torch.testing.assert_close(plain[30], torch.from_numpy(_pixels(7, 2)).permute(2, 0, 1) / 127.5 - 1)
    rows = {image.numpy().tobytes() for image in next(iter(data.train_dataloader()))[0]}
    assert rows <= {image.numpy().tobytes() for image in (*plain, *plain.flip(-1))}
    assert rows - {image.numpy().tobytes() for image in plain}


def test_a_missing_root_says_so_before_any_work() -> None:
    with pytest.raises(ConfigurationError, match=r"No CIFAR-10 in '.*/nowhere': found no such folder.*download"):
        CIFARDataModule("nowhere").prepare_data()


def test_another_layout_is_listed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigurationError, match="found 'images', but expected either 'cifar-100-python'"):
        CIFARDataModule(str(tmp_path), classes=100).setup("fit")


def test_another_number_of_classes_is_refused(folders: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Found 10 class folders .* expected 100"):
        CIFARDataModule(str(folders), classes=100).setup("fit")


def test_images_of_another_size_are_refused(folders: Path) -> None:
    Image.new("RGB", (16, 20)).save(folders / "train" / "class3" / "1.png")
    with pytest.raises(ConfigurationError, match=r"found 16x20 in '.*1.png'.*ImageFolderDataModule"):
        CIFARDataModule(str(folders)).setup("fit")


def test_an_empty_class_folder_is_refused(folders: Path) -> None:
    for image in (folders / "test" / "class3").iterdir():
        image.unlink()
    with pytest.raises(ConfigurationError, match="class3"):
        CIFARDataModule(str(folders)).setup("test")


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="found classes=20"):
        CIFARDataModule(classes=20)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="validation_images >= 0, but found -1"):
        CIFARDataModule(validation_images=-1)


@pytest.mark.real
def test_real_cifar10_has_the_statistics_and_sizes_it_is_normalised_with() -> None:
    root = Path(os.environ.get("LIGHTNING_QUANT_ASSETS", ""), "cifar10")
    if not (root / "train").is_dir():
        pytest.skip(
            "needs CIFAR-10 as class folders of PNGs in $LIGHTNING_QUANT_ASSETS/cifar10/{train,test}: write "
            "torchvision.datasets.CIFAR10(..., download=True) out as PNGs, then set LIGHTNING_QUANT_ASSETS"
        )
    data = CIFARDataModule(str(root))
    kept = data.calibration_dataset()
    images, labels = next(iter(DataLoader(kept, batch_size=45_000)))
    assert torch.bincount(labels).tolist() == [4500] * 10
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=0.01, rtol=0)
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 5000
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 10_000
