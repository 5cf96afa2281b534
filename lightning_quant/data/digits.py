"""DataModule of scikit-learn's handwritten digits, a real data set that needs no files."""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lightning_quant.data.base import AnyDataset, ImageDataModule, TrainingSplits
from lightning_quant.data.tensor_images import TensorImages
from lightning_quant.errors import ConfigurationError

_TEST_IMAGES = 360
_MEAN, _STD = (0.3053,), (0.3760,)


class DigitsDataModule(ImageDataModule):
    """DataModule of 1,797 gray images of 8x8 pixels in 10 classes: 360 for test, the rest for train and validation.

    Images are ``(N, 1, 8, 8)``. The test images are the same for every ``seed``.

    Args:
        batch_size: Number of images per batch.
        validation_fraction: Fraction of the 1,437 other images to hold out, in [0, 1).
        num_workers: Number of loader processes.
        pin_memory: Whether to use page-locked batches, see :class:`ImageDataModule`.
        seed: Seed of the held-out split.
        mean: Mean, for images in [0, 1]. 0.5 with ``std`` 0.5 gives images in [-1, 1], as diffusion needs them.
        std: Standard deviation, for images in [0, 1].

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape, data.num_classes
        (torch.Size([32, 1, 8, 8]), torch.Size([32]), 10)
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        validation_fraction: float = 0.1,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        if not 0 <= validation_fraction < 1:
            raise ConfigurationError(
                f"Expected validation_fraction in [0, 1), but found {validation_fraction}. Write for example 0.1."
            )
        self.validation_fraction = validation_fraction
        self.mean, self.std = tuple(mean), tuple(std)

    def check_files(self) -> None:
        """Check nothing, since the images are part of scikit-learn."""

    def load_training(self) -> TrainingSplits:
        images = self._digits(test=False)
        held_out = round(self.validation_fraction * len(images))
        return TrainingSplits.held_out(images, images, images.labels.tolist(), held_out, self.seed)

    def load_test(self) -> AnyDataset:
        return self._digits(test=True)

    def _digits(self, test: bool) -> TensorImages:
        pixels, labels = load_digits(return_X_y=True)
        train_pixels, test_pixels, train_labels, test_labels = train_test_split(
            pixels, labels, test_size=_TEST_IMAGES, random_state=0, stratify=labels
        )
        images = torch.from_numpy(test_pixels if test else train_pixels).to(torch.uint8).reshape(-1, 1, 8, 8)
        targets = torch.from_numpy(test_labels if test else train_labels).long()
        return TensorImages(images, targets, self.mean, self.std, full_scale=16.0)
