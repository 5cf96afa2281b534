import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lightning_quant.data.fashion_mnist import FashionMNISTDataModule
from lightning_quant.errors import ConfigurationError

_TRAIN, _TEST = 30, 10


def _pixels(images: int) -> NDArray[np.uint8]:
    return np.random.default_rng(images).integers(0, 256, (images, 28, 28), dtype=np.uint8)


def _labels(images: int) -> NDArray[np.uint8]:
    return (np.arange(images) % 10).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Torchvision's four files, with three training images and a test image of each class."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, images in (("train", _TRAIN), ("t10k", _TEST)):
        pixels = struct.pack(">IIII", 0x803, images, 28, 28) + _pixels(images).tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, images) + _labels(images).tobytes())
    return tmp_path


def test_images_are_torchvisions_in_order_normalised_with_the_statistics(root: Path) -> None:
    data = FashionMNISTDataModule(str(root), validation_images=0)
    images, labels = next(iter(DataLoader(data.calibration_dataset(), batch_size=_TRAIN)))
    expected = (torch.from_numpy(_pixels(_TRAIN)) / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(images, expected[:, None])
    assert labels.tolist() == _labels(_TRAIN).tolist()


def test_a_mean_and_std_of_a_half_give_images_from_minus_one_to_one(root: Path) -> None:
    data = FashionMNISTDataModule(str(root), validation_images=0, batch_size=10, mean=[0.5], std=[0.5])
    images, _ = next(iter(data.test_dataloader()))
    torch.testing.assert_close(images, torch.from_numpy(_pixels(_TEST))[:, None] / 127.5 - 1)


def test_held_out_images_are_of_every_class_and_not_trained_on(root: Path) -> None:
    data = FashionMNISTDataModule(str(root), validation_images=10, batch_size=20)
    held, labels = next(iter(data.val_dataloader()))
    kept, _ = next(iter(data.train_dataloader()))
    assert sorted(labels.tolist()) == list(range(10))
    assert len({image.numpy().tobytes() for image in torch.cat([held, kept])}) == _TRAIN


def test_missing_files_are_named_with_what_to_write(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"No Fashion-MNIST in '.*/nowhere': found no such.*download=True"):
        FashionMNISTDataModule("nowhere").prepare_data()
    (root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigurationError, match=r"missing: t10k-labels-idx1-ubyte\. Write root=FOLDER"):
        FashionMNISTDataModule(str(root)).setup("fit")


def test_other_arguments_are_refused(root: Path) -> None:
    with pytest.raises(ConfigurationError, match="validation_images >= 0, but found -1"):
        FashionMNISTDataModule(validation_images=-1)
    with pytest.raises(ConfigurationError, match="each of 1 channels, but found 3 and 1"):
        FashionMNISTDataModule(str(root), mean=[0.5] * 3).setup("test")
