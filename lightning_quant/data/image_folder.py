"""DataModule of any classification data in class folders, such as ImageNet, with timm's transforms."""

import copy
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torchvision.datasets import ImageFolder

from lightning_quant.data.base import AnyDataset, ImageDataModule, TrainingSplits
from lightning_quant.data.folders import image_folder, listing
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.paths import user_path


class ImageFolderDataModule(ImageDataModule):
    """DataModule of images in ``root/train/CLASS``, ``root/val/CLASS`` and, optionally, ``root/test/CLASS``.

    Validation uses ``root/val``, or, with ``validation_fraction > 0``, a held-out part of ``root/train``. Testing uses
    ``root/test`` if it exists, otherwise ``root/val``. Images are ``(N, 3, image_size, image_size)``. Training images
    are randomly cropped and flipped; evaluation images are resized to ``image_size / crop_pct`` and center-cropped.

    Args:
        root: Folder of the splits.
        image_size: Height and width of the network's input.
        batch_size: Number of images per batch on each device.
        validation_fraction: Fraction of the training images to hold out instead of ``root/val``, in [0, 1).
        interpolation: Interpolation by its name in timm: ``bilinear``, ``bicubic``, ...
        crop_pct: Fraction of each side of the resized image that evaluation keeps.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel, for images in [0, 1].
        crop_scale: Smallest and largest fraction of the area that a training crop covers.
        color_jitter: Strength of timm's color jitter.
        auto_augment: Augmentation string of timm, such as ``rand-m9-mstd0.5-inc1``.
        random_erasing: Probability of erasing a rectangle of a training image.
        num_workers: Number of loader processes.
        pin_memory: Whether to use page-locked batches, see :class:`ImageDataModule`.
        seed: Seed of the held-out split.

    Raises:
        ConfigurationError: An argument is out of range; or, in ``prepare_data`` and ``setup``, a split is missing,
            empty, or has other classes than ``root/train``.

    Example:
        >>> data = ImageFolderDataModule(root="imagenet", image_size=224)
        >>> data.prepare_data()
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: No class folders in '...imagenet/train': ...
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 224,
        batch_size: int = 256,
        validation_fraction: float = 0.0,
        interpolation: str = "bilinear",
        crop_pct: float = 0.875,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        num_workers: int = 4,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        for name, value, inside in (
            ("validation_fraction in [0, 1)", validation_fraction, 0 <= validation_fraction < 1),
            ("random_erasing in [0, 1]", random_erasing, 0 <= random_erasing <= 1),
            ("crop_pct in (0, 1]", crop_pct, 0 < crop_pct <= 1),
            ("image_size >= 1", image_size, image_size >= 1),
        ):
            if not inside:
                raise ConfigurationError(f"Expected {name}, but found {value}.")
        self.root = user_path(root)
        self.image_size = image_size
        self.validation_fraction = validation_fraction
        self._common: dict[str, Any] = {
            "input_size": image_size,
            "interpolation": interpolation,
            "mean": tuple(mean),
            "std": tuple(std),
        }
        self._evaluation: dict[str, Any] = {"crop_pct": crop_pct}
        self._augmentation: dict[str, Any] = {
            "scale": tuple(crop_scale),
            "color_jitter": color_jitter or None,
            "auto_augment": auto_augment,
            "re_prob": random_erasing,
        }

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of class folders in ``root/train``."""
        return len(_class_names(self.root / "train"))

    def train_transform(self) -> Any:
        """Create the random transform of a training image (PIL to ``(3, image_size, image_size)``)."""
        return create_transform(**self._common, **self._augmentation, is_training=True)

    def evaluation_transform(self) -> Any:
        """Create the deterministic transform of an image for validation, test and calibration."""
        return create_transform(**self._common, **self._evaluation)

    def check_files(self) -> None:
        expected = _class_names(self.root / "train")
        for split in ("val", "test"):
            required = split == "val" and self.validation_fraction == 0
            if required or (self.root / split).is_dir():
                self._check_same_classes(split, expected)

    def load_training(self) -> TrainingSplits:
        plain = self._folder(self.root / "train")
        augmented = copy.copy(plain)
        augmented.transform = self.train_transform()
        if self.validation_fraction == 0:
            return TrainingSplits(augmented, self._folder(self.root / "val"), plain)
        held_out = round(self.validation_fraction * len(plain))
        return TrainingSplits.held_out(augmented, plain, plain.targets, held_out, self.seed)

    def load_test(self) -> AnyDataset:
        test, validation = self.root / "test", self.root / "val"
        if not test.is_dir() and not validation.is_dir():
            raise ConfigurationError(
                f"Nothing to test on in '{self.root}': found {listing(self.root)}, "
                "but expected class folders in 'test' or 'val'."
            )
        dataset: AnyDataset = self._folder(test if test.is_dir() else validation)
        return dataset

    def _folder(self, folder: Path) -> ImageFolder:
        return image_folder(folder, self.evaluation_transform())

    def _check_same_classes(self, split: str, expected: set[str]) -> None:
        differing = _class_names(self.root / split) ^ expected
        if differing:
            raise ConfigurationError(
                f"'{self.root}/{split}' and '{self.root}/train' have different classes: only one of them has "
                f"{sorted(differing)[:5]}. Expected the same class folders in both."
            )


def _class_names(split: Path) -> set[str]:
    names = {entry.name for entry in split.iterdir() if entry.is_dir()} if split.is_dir() else set()
    if not names:
        raise ConfigurationError(
            f"No class folders in '{split}': found {listing(split)}; its parent folder has {listing(split.parent)}. "
            f"Expected '{split}/CLASS/IMAGE'. Write root=FOLDER with the folder that contains 'train' and 'val'; "
            "without 'val' write validation_fraction=0.1."
        )
    return names
