"""Base class of the DataModules for classification: splits, loaders, and checks of the files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_quant.errors import ConfigurationError

AnyDataset = Dataset[Any]
AnyLoader = DataLoader[Any]


@dataclass(frozen=True)
class TrainingSplits:
    """Data sets for the three uses of the training images.

    Attributes:
        train: Training images with the training transform.
        validation: Held-out images with the evaluation transform; None if nothing is held out.
        calibration: Images of ``train`` in the same order, with the evaluation transform.
    """

    train: AnyDataset
    validation: AnyDataset | None
    calibration: AnyDataset

    @classmethod
    def held_out(
        cls, train: AnyDataset, plain: AnyDataset, labels: Sequence[int], validation_images: int, seed: int
    ) -> "TrainingSplits":
        """Split two views of the same images: ``train`` with augmentation, ``plain`` with the evaluation transform."""
        train_indices, validation_indices = held_out_split(labels, validation_images, seed)
        validation = Subset(plain, validation_indices) if validation_indices else None
        return cls(Subset(train, train_indices), validation, Subset(plain, train_indices))


def held_out_split(labels: Sequence[int], held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Split indices into those to keep and those to hold out, both ascending and stratified by class.

    Args:
        labels: Class of each image, ``(N,)``.
        held_out: Number of images to hold out. 0 keeps all.
        seed: Seed of the split, which is the same on every machine.

    Raises:
        ConfigurationError: There are too few images to hold out that many of each class.

    Example:
        >>> kept, held = held_out_split([0, 0, 0, 1, 1, 1], held_out=2, seed=0)
        >>> len(kept), sorted([0, 0, 0, 1, 1, 1][i] for i in held)
        (4, [0, 1])
    """
    indices = np.arange(len(labels))
    if held_out == 0:
        return indices.tolist(), []
    try:
        kept, held = train_test_split(indices, test_size=held_out, random_state=seed, stratify=labels)
    except ValueError as error:
        raise ConfigurationError(
            f"Cannot hold out {held_out} of {len(labels)} images of {len(set(labels))} classes: {error} "
            "Write another number, at least one image per class, or 0 to hold out nothing."
        ) from error
    return sorted(kept.tolist()), sorted(held.tolist())


class ImageDataModule(LightningDataModule, ABC):
    """Base class of DataModules with loaders over training splits and a test set.

    Batches are ``(images, labels)``: float32 ``(N, C, H, W)`` and int64 ``(N,)``. A subclass defines ``num_classes``,
    the check of its files, and how to load them, which happens once.

    Args:
        batch_size: Number of images per batch on each device.
        num_workers: Number of loader processes. 0 loads in the training process.
        pin_memory: Whether to use page-locked batches, which copy faster to a GPU. None means if there is a GPU.
        seed: Seed of the held-out split. Order and augmentation depend on ``seed_everything`` instead.

    Raises:
        ConfigurationError: ``batch_size`` or ``num_workers`` is out of range; or, in ``prepare_data`` and ``setup``,
            the files are missing or in another layout.

    Example:
        >>> from lightning_quant.data import DigitsDataModule
        >>> isinstance(DigitsDataModule(), ImageDataModule)
        True
    """

    num_classes: int

    def __init__(self, batch_size: int, num_workers: int = 0, pin_memory: bool | None = None, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ConfigurationError(
                "Expected batch_size >= 1 and num_workers >= 0, "
                f"found batch_size={batch_size}, num_workers={num_workers}."
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self._training: TrainingSplits | None = None
        self._test: AnyDataset | None = None

    @abstractmethod
    def check_files(self) -> None:
        """Raise a ConfigurationError unless the files are present as expected, without reading an image."""

    @abstractmethod
    def load_training(self) -> TrainingSplits:
        """Load and split the training images."""

    @abstractmethod
    def load_test(self) -> AnyDataset:
        """Load the test images with the evaluation transform."""

    def prepare_data(self) -> None:
        self.check_files()

    def setup(self, stage: str) -> None:
        self.check_files()
        if stage in ("fit", "validate") and self._training is None:
            self._training = self.load_training()
        if stage in ("test", "predict") and self._test is None:
            self._test = self.load_test()

    def calibration_dataset(self) -> AnyDataset:
        """Return the training images, without held-out ones, with the evaluation transform, in the order on disk."""
        return self._training_splits().calibration

    def train_dataloader(self) -> AnyLoader:
        dataset = self._training_splits().train
        # BatchNorm1d rejects a last batch with a single image, since it has no batch statistics.
        return self._loader(dataset, shuffle=True, drop_last=_length(dataset) >= self.batch_size)

    def val_dataloader(self) -> AnyLoader | list[AnyLoader]:
        validation = self._training_splits().validation
        return self._loader(validation) if validation is not None else []

    def test_dataloader(self) -> AnyLoader:
        return self._loader(self._test_set())

    def predict_dataloader(self) -> AnyLoader:
        return self._loader(self._test_set())

    def _training_splits(self) -> TrainingSplits:
        if self._training is None:
            self.setup("fit")
        assert self._training is not None
        return self._training

    def _test_set(self) -> AnyDataset:
        if self._test is None:
            self.setup("test")
        assert self._test is not None
        return self._test

    def _loader(self, dataset: AnyDataset, shuffle: bool = False, drop_last: bool = False) -> AnyLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
        )


def _length(dataset: AnyDataset) -> int:
    return len(dataset)  # type: ignore[arg-type]
