"""DataModule of Fashion-MNIST, decoded once and kept in memory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.datasets import FashionMNIST

from lightning_quant.data.base import AnyDataset, ImageDataModule, TrainingSplits
from lightning_quant.data.folders import listing
from lightning_quant.data.tensor_images import TensorImages
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.paths import user_path

_MEAN, _STD = (0.2860,), (0.3530,)


class FashionMNISTDataModule(ImageDataModule):
    """DataModule of 60,000 training and 10,000 test images of garments: gray, 28x28 pixels, 10 classes.

    The files are torchvision's, in ``root/FashionMNIST/raw``. Images are ``(N, 1, 28, 28)``, by default normalized with
    the statistics of the training set, and not augmented.

    Args:
        root: Folder that contains ``FashionMNIST``.
        batch_size: Number of images per batch.
        validation_images: Number of training images to hold out. 0 trains on all, without validation.
        download: Whether to download torchvision's files into ``root`` if they are missing.
        num_workers: Number of loader processes. 0 serves an epoch in a few seconds.
        pin_memory: Whether to use page-locked batches, see :class:`ImageDataModule`.
        seed: Seed of the held-out split.
        mean: Mean, for images in [0, 1]. 0.5 with ``std`` 0.5 gives images in [-1, 1], as diffusion needs them.
        std: Standard deviation, for images in [0, 1].

    Raises:
        ConfigurationError: An argument is out of range; or, in ``prepare_data`` and ``setup``, the files are missing.

    Example:
        >>> data = FashionMNISTDataModule(root="data")
        >>> data.num_classes
        10
        >>> data.setup("fit")
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: No Fashion-MNIST in '...data': ...
    """

    num_classes = 10

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 128,
        validation_images: int = 5000,
        download: bool = False,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        if validation_images < 0:
            raise ConfigurationError(f"Expected validation_images >= 0, but found {validation_images}.")
        self.root = user_path(root)
        self.validation_images = validation_images
        self.download = download
        self.mean, self.std = tuple(mean), tuple(std)

    def prepare_data(self) -> None:
        if self.download:
            FashionMNIST(self.root, download=True)
        self.check_files()

    def check_files(self) -> None:
        raw = self.root / "FashionMNIST" / "raw"
        missing = [
            name for file, _ in FashionMNIST.resources if not (raw / (name := file.removesuffix(".gz"))).is_file()
        ]
        if missing:
            raise ConfigurationError(
                f"No Fashion-MNIST in '{self.root}': found {listing(self.root)}, but expected the four files of "
                f"torchvision in 'FashionMNIST/raw'; missing: {', '.join(missing)}. "
                "Write root=FOLDER with the folder that contains 'FashionMNIST', or download=True."
            )

    def load_training(self) -> TrainingSplits:
        images = self._decode(train=True)
        return TrainingSplits.held_out(images, images, images.labels.tolist(), self.validation_images, self.seed)

    def load_test(self) -> AnyDataset:
        return self._decode(train=False)

    def _decode(self, train: bool) -> TensorImages:
        stored = FashionMNIST(self.root, train=train)
        images, labels = torch.as_tensor(stored.data), torch.as_tensor(stored.targets)
        return TensorImages(images.unsqueeze(1), labels, self.mean, self.std)
