"""DataModule of CIFAR-10 and CIFAR-100, decoded once and kept in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_quant.data.base import AnyDataset, ImageDataModule, TrainingSplits
from lightning_quant.data.folders import image_folder, listing
from lightning_quant.data.tensor_images import RandomCropFlip, TensorImages
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.paths import user_path

_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_SIZE = 32


class CIFARDataModule(ImageDataModule):
    """DataModule of CIFAR-10 or CIFAR-100, from torchvision's files or from folders of PNGs.

    The files are either in ``root/cifar-10-batches-py`` (``root/cifar-100-python``), or in ``root/train/CLASS/*.png``
    and ``root/test/CLASS/*.png``. Images are ``(N, 3, 32, 32)``, by default normalized with the statistics of the
    training set. Training images are padded by ``crop_padding``, randomly cropped and randomly flipped.

    Args:
        root: Folder with either layout.
        classes: Number of classes, 10 or 100.
        batch_size: Number of images per batch.
        validation_images: Number of the 50,000 training images to hold out. 0 trains on all, without validation.
        augment: Whether to crop and flip training images.
        download: Whether to download torchvision's files into ``root`` if they are missing.
        num_workers: Number of loader processes. 0 serves an epoch in a few seconds.
        pin_memory: Whether to use page-locked batches, see :class:`ImageDataModule`.
        seed: Seed of the held-out split.
        crop_padding: Number of black pixels on each side before the random crop. 0 flips without cropping.
        mean: Mean of each channel, for images in [0, 1]. 0.5 with ``std`` 0.5 gives images in [-1, 1], as diffusion
            needs them. Default: mean of the training set.
        std: Standard deviation of each channel. Default: that of the training set.

    Raises:
        ConfigurationError: ``root`` has neither layout, another number of classes, or images of another size (raised in
            ``prepare_data`` or ``setup``).

    Example:
        >>> data = CIFARDataModule(root="data", classes=100)
        >>> data.num_classes
        100
        >>> data.setup("fit")
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: No CIFAR-100 in '...data': ...
    """

    def __init__(
        self,
        root: str | Path = "data",
        classes: Literal[10, 100] = 10,
        batch_size: int = 128,
        validation_images: int = 5000,
        augment: bool = True,
        download: bool = False,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
        crop_padding: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        if classes not in _STATISTICS:
            raise ConfigurationError(f"CIFAR has 10 or 100 classes, but found classes={classes}.")
        if validation_images < 0:
            raise ConfigurationError(f"Expected validation_images >= 0, but found {validation_images}.")
        self.root = user_path(root)
        self.num_classes = classes
        self.validation_images = validation_images
        self.augment = augment
        self.download = download
        default_mean, default_std = _STATISTICS[classes]
        self.mean = tuple(default_mean if mean is None else mean)
        self.std = tuple(default_std if std is None else std)
        self._crop_flip = RandomCropFlip(crop_padding)

    def prepare_data(self) -> None:
        if self.download and not self._has_folders():
            for train in (True, False):
                self._torchvision_class()(self.root, train=train, download=True)
        self.check_files()

    def check_files(self) -> None:
        if self._has_folders():
            for split in ("train", "test"):
                _check_class_folders(self.root / split, self.num_classes)
        elif not self._pickles().is_dir():
            raise ConfigurationError(
                f"No CIFAR-{self.num_classes} in '{self.root}': found {listing(self.root)}, but expected "
                f"either '{self._pickles().name}' or class folders of PNGs in 'train' and 'test'. "
                "Write root=FOLDER with the folder that contains them, or download=True."
            )

    def load_training(self) -> TrainingSplits:
        images, labels = self._decode("train")
        plain = TensorImages(images, labels, self.mean, self.std)
        train = TensorImages(images, labels, self.mean, self.std, self._crop_flip) if self.augment else plain
        return TrainingSplits.held_out(train, plain, labels.tolist(), self.validation_images, self.seed)

    def load_test(self) -> AnyDataset:
        return TensorImages(*self._decode("test"), self.mean, self.std)

    def _decode(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        if self._has_folders():
            return _decode_folder(self.root / split)
        stored = self._torchvision_class()(self.root, train=split == "train")
        return torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(stored.targets)

    def _has_folders(self) -> bool:
        return (self.root / "train").is_dir() and (self.root / "test").is_dir()

    def _torchvision_class(self) -> type[CIFAR10]:
        dataset: type[CIFAR10] = CIFAR10 if self.num_classes == 10 else CIFAR100
        return dataset

    def _pickles(self) -> Path:
        folder: Path = self.root / self._torchvision_class().base_folder
        return folder


def _check_class_folders(split: Path, expected: int) -> None:
    count = sum(entry.is_dir() for entry in split.iterdir())
    if count != expected:
        raise ConfigurationError(
            f"Found {count} class folders in '{split}', but expected {expected}. "
            "Write classes=10 or classes=100 to match the data."
        )


def _decode_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """Decode a folder to images, uint8 ``(N, 3, 32, 32)``, and labels, int64 ``(N,)``, in ImageFolder's order."""
    dataset = image_folder(folder)
    pixels = np.empty((len(dataset), _SIZE, _SIZE, 3), dtype=np.uint8)
    for index, (path, _) in enumerate(dataset.samples):
        image = np.asarray(dataset.loader(path))
        if image.shape != (_SIZE, _SIZE, 3):
            raise ConfigurationError(
                f"Expected images of 32x32 pixels, but found {image.shape[1]}x{image.shape[0]} in '{path}'. "
                "For other sizes write ImageFolderDataModule(root=...)."
            )
        pixels[index] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
