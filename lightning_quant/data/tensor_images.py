"""Data set of images in memory, which are fetched a batch at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lightning_quant.errors import ConfigurationError

Sample = tuple[Tensor, int]


@dataclass(frozen=True)
class RandomCropFlip:
    """Zero padding, a random crop back to the original size, and a random horizontal flip, drawn for each image.

    The draws use torch's global generator, so they are reproducible with ``seed_everything`` and Lightning's seeding of
    loader workers.

    Args:
        padding: Number of pixels to add on each side before the crop.

    Shape:
        ``(N, C, H, W)`` of any dtype; the output has the same shape and dtype.

    Example:
        >>> images = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
        >>> RandomCropFlip(padding=1)(images).shape
        torch.Size([1, 1, 3, 3])
    """

    padding: int = 4

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ConfigurationError(f"Expected padding >= 0, but found {self.padding}. Write for example padding=4.")

    def __call__(self, images: Tensor) -> Tensor:
        number, _, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        # A view of all crops of all images, so that selecting one per image is a single copy.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        top, left = torch.randint(2 * self.padding + 1, (2, number))
        cropped = crops[torch.arange(number), :, top, left]
        flip = torch.rand(number) < 0.5
        return torch.where(flip[:, None, None, None], cropped.flip(-1), cropped)


class TensorImages(Dataset[Sample]):
    """Data set of images in one uint8 tensor, which are augmented and normalized when they are fetched.

    A DataLoader calls ``__getitems__``, which processes the whole batch in a few tensor operations.

    Args:
        images: Images, uint8, ``(N, C, H, W)``.
        labels: Labels, int64, ``(N,)``.
        mean: Mean of each channel, as a fraction of ``full_scale``.
        std: Standard deviation of each channel, as a fraction of ``full_scale``.
        augment: Function from a uint8 batch to a uint8 batch, applied before normalization. None for evaluation.
        full_scale: Largest pixel value.

    Raises:
        ConfigurationError: Dtypes, shapes or numbers of channels do not match.

    Example:
        >>> images = torch.full((5, 1, 8, 8), 255, dtype=torch.uint8)
        >>> dataset = TensorImages(images, torch.arange(5), mean=(0.5,), std=(0.25,))
        >>> image, label = dataset[3]
        >>> image.shape, image.max().item(), label
        (torch.Size([1, 8, 8]), 2.0, 3)
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Callable[[Tensor], Tensor] | None = None,
        full_scale: float = 255.0,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ConfigurationError(
                "Expected uint8 images (N, C, H, W) with labels (N,), but found "
                f"{images.dtype} images {tuple(images.shape)} with labels {tuple(labels.shape)}."
            )
        if not len(mean) == len(std) == images.shape[1]:
            raise ConfigurationError(
                f"Expected one mean and one std for each of {images.shape[1]} channels, "
                f"but found {len(mean)} and {len(std)}."
            )
        self.images = images
        self.labels = labels
        self.augment = augment
        self._mean = full_scale * torch.tensor(mean)[:, None, None]
        self._std = full_scale * torch.tensor(std)[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        index = torch.as_tensor(indices)
        images = self.images[index]
        if self.augment is not None:
            images = self.augment(images)
        normalized = images.float().sub_(self._mean).div_(self._std)
        return list(zip(normalized.unbind(), self.labels[index].tolist(), strict=True))
