"""Draw of unlabeled calibration images, independent of the number of ranks, workers and batches."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_quant.calibration.image_source import AnyDataset, CalibrationSource, loader_like
from lightning_quant.errors import ConfigurationError, QuantizationError

Extract = Callable[[Any], Tensor]

_KEYS = ("image", "images", "pixel_values", "img", "x", "input")


def calibration_images(
    source: CalibrationSource,
    count: int,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    images: Extract | None = None,
) -> Tensor:
    """Draw random images without replacement, and return this rank's share.

    The draw depends only on the data set, ``count`` and ``seed``: a smaller ``count`` gives the first of the same
    images, and each rank takes every ``ranks``-th one. Random transforms are seeded for each image, and the caller's
    random state is not affected. Data without length and index, such as an ``IterableDataset``, give their first
    ``count`` images.

    Args:
        source: Source from :func:`~lightning_quant.calibration.image_source.from_trainer` or ``calibration_source``.
        count: Number of images over all ranks.
        seed: Seed of the draw.
        rank: Rank of this process, from 0.
        ranks: Number of ranks that calibrate together.
        images: Function that returns the images of a batch. Default: :func:`images_of`. If it returns several images
            per item, the first one is used. It is not applied to a source of plain images.

    Returns:
        Images ``(n, C, H, W)`` on the CPU; ``n`` is ``count / ranks``, rounded up on the first ranks.

    Raises:
        ConfigurationError: There are fewer images than requested or than ranks, the images have several sizes, or no
            images are recognized in a batch.
        QuantizationError: A pixel is NaN or infinite.

    Example:
        >>> from lightning_quant.calibration import calibration_source
        >>> from lightning_quant.data import DigitsDataModule
        >>> source = calibration_source(datamodule=DigitsDataModule())
        >>> calibration_images(source, count=32).shape
        torch.Size([32, 1, 8, 8])
    """
    if not 0 <= rank < ranks <= count:
        raise ConfigurationError(
            f"Requested {count} calibration images on {ranks} ranks, of which this is rank {rank}: expected at least"
            f" one image per rank. Write calibration_images={max(ranks, 1)} or more."
        )
    extract = images_of if images is None or source.plain else images
    total = _length(source.loader)
    with torch.no_grad(), _seeded(seed):
        if total is None:
            first = _collect(_first_batches(source.loader), source, extract, count)
            _check_enough(len(first), count, source.origin)
            return first[:count][rank::ranks].clone()
        _check_enough(total, count, source.origin)
        assert isinstance(source.loader, DataLoader)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count][rank::ranks].tolist()
        collected = _collect(loader_like(source.loader, _Drawn(source.loader.dataset, drawn, seed)), source, extract)
    if extract is not images_of and len(collected) and not len(collected) % len(drawn):
        collected = collected[:: len(collected) // len(drawn)].clone()
    if len(collected) != len(drawn):
        raise ConfigurationError(
            f"Drew {len(drawn)} items from {source.origin}, but its batches hold {len(collected)} images: its"
            " collate_fn drops items or makes several images of one. Write calibration_data=DATASET with one image per"
            " item."
        )
    return collected


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch, in any of the common layouts.

    Args:
        batch: Images; or a tuple or list that starts with images, as one tensor or as a list of tensors; or a dict
            with images under ``image``, ``images``, ``pixel_values``, ``img``, ``x`` or ``input``.

    Returns:
        Floating-point images, ``(N, C, H, W)``.

    Raises:
        ConfigurationError: There are no images in these places.
        QuantizationError: A pixel is NaN or infinite.

    Example:
        >>> images_of({"pixel_values": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2)}).shape
        torch.Size([2, 3, 8, 8])
    """
    match batch:
        case Mapping():
            images = next((batch[key] for key in _KEYS if key in batch), None)
        case [list() | tuple() as tensors, *_] if tensors and all(isinstance(tensor, Tensor) for tensor in tensors):
            images = _stacked(tensors)
        case [first, *_]:
            images = first
        case _:
            images = batch
    return _checked(images, batch)


class _Drawn(Dataset[Any]):
    """Drawn items of a data set. Each item is the same no matter which worker loads it, and with which others."""

    def __init__(self, dataset: AnyDataset, indices: list[int], seed: int) -> None:
        self.dataset, self.indices, self.seed = dataset, indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        index = self.indices[position]
        with _seeded(self.seed * 1_000_003 + index):
            return self.dataset[index]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators that transforms use, and restore them afterwards."""
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (transforms use the global generator)
        torch.default_generator.manual_seed(seed)
        yield


def _length(loader: Any) -> int | None:
    """Return the number of items that can be fetched by index, or None if the loader can only be iterated."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_sampler is None:
        return None
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _first_batches(loader: Any) -> Iterable[Any]:
    match loader:
        case DataLoader(dataset=IterableDataset(), batch_sampler=batch_sampler) if batch_sampler is not None:
            return loader_like(loader, loader.dataset)  # keeps a smaller last batch
    return loader  # type: ignore[no-any-return]


def _collect(batches: Iterable[Any], source: CalibrationSource, extract: Extract, limit: int | None = None) -> Tensor:
    """Collect the images of batches until there are ``limit``."""
    collected: list[Tensor] = []
    try:
        for batch in batches:
            prepared = batch if source.prepare is None else source.prepare(batch)
            collected.append(_finite(extract(prepared), prepared).cpu())
            if limit is not None and sum(map(len, collected)) >= limit:
                break
    except RuntimeError as error:
        # The message of PyTorch's default collate_fn, from this process or a worker.
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise _several_sizes(str(error).strip().splitlines()[-1]) from error
    if len({images.shape[1:] for images in collected}) > 1:
        raise _several_sizes(", ".join(sorted({_shape(images[0]) for images in collected})))
    return torch.cat(collected) if collected else torch.empty(0)


def _stacked(images: Any) -> Tensor:
    if len(sizes := sorted({_shape(image) for image in images})) > 1:
        raise _several_sizes(", ".join(sizes))
    return torch.stack(list(images))


def _several_sizes(sizes: str) -> ConfigurationError:
    return ConfigurationError(
        f"Calibration images have different sizes: {sizes}. Add a transform that resizes and crops them to the input"
        " size of the network."
    )


def _check_enough(available: int, requested: int, origin: str) -> None:
    if available < requested:
        raise ConfigurationError(
            f"Requested {requested} calibration images, but found {available} in {origin}."
            f" Write calibration_images={available}, or calibration_data=DATASET for a larger data set."
        )


def _checked(images: Any, batch: Any) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 3:
        raise ConfigurationError(
            "Expected a batch of floating-point images, (N, C, H, W): a tensor, the first entry of a tuple, or a dict"
            f" with one of {', '.join(_KEYS)}. Found {_describe(batch)}."
            ' Write images=FUNCTION to get the images of a batch, such as images=lambda batch: batch["pixels"].'
        )
    return _finite(images, batch)


def _finite(images: Any, batch: Any) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim < 3:
        raise ConfigurationError(
            f"images=FUNCTION returned {_describe(images)} for {_describe(batch)}, but expected images (N, C, H, W) as"
            " the network takes them."
        )
    if not images.isfinite().all():
        bad = int((~images.isfinite()).sum())
        raise QuantizationError(
            f"{bad} of {images.numel()} pixels of a calibration batch are NaN or infinite, which makes the ranges"
            " meaningless. Check for a division by a standard deviation of 0 in the transform, or a broken file."
        )
    return images


def _describe(batch: Any) -> str:
    match batch:
        case Tensor():
            return f"{str(batch.dtype).removeprefix('torch.')} {_shape(batch)}"
        case Mapping():
            return "a dict with " + ", ".join(f"{key!r}: {_describe(value)}" for key, value in batch.items())
        case list() | tuple():
            return f"a {type(batch).__name__} of " + (", ".join(map(_describe, batch[:4])) or "nothing")
    return f"a {type(batch).__name__}"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
