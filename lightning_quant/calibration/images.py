"""Unlabelled calibration images: which ones, the same for any number of ranks, workers and batches."""

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
    """A random draw of images without replacement; this rank's share of it.

    The draw depends on the data set, ``count`` and ``seed`` only: a smaller ``count`` draws the first of the
    same images, and each rank takes every ``ranks``-th. Random transforms are seeded for each image, and the
    caller's random numbers go on as if nothing had been drawn. Of data without length and index, such as an
    ``IterableDataset``, these are the first ``count`` images.

    Args:
        source: From :func:`~lightning_quant.calibration.image_source.from_trainer` or ``calibration_source``.
        count: Images over all ranks.
        seed: Of the draw.
        rank: This process, from 0.
        ranks: How many processes calibrate together.
        images: From a batch to its images, by default :func:`images_of`. Where it makes several images of an item,
            the first one counts. Of a source of plain images they are taken as they are.

    Returns:
        Images ``(n, C, H, W)`` on the CPU; ``n`` is ``count / ranks``, rounded up on the first ranks.

    Raises:
        ConfigurationError: If there are fewer images than asked, fewer than ranks, images of several sizes, or
            batches in which no images are recognized.
        QuantizationError: If a pixel is NaN or infinite.

    Example:
        >>> from lightning_quant.calibration import calibration_source
        >>> from lightning_quant.data import DigitsDataModule
        >>> source = calibration_source(datamodule=DigitsDataModule())
        >>> calibration_images(source, count=32).shape
        torch.Size([32, 1, 8, 8])
    """
    if not 0 <= rank < ranks <= count:
        raise ConfigurationError(
            f"Asked for {count} calibration images on {ranks} ranks, of which this is rank {rank}: expected at"
            f" least one image a rank. Write calibration_images={max(ranks, 1)} or more."
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
        found = _collect(loader_like(source.loader, _Drawn(source.loader.dataset, drawn, seed)), source, extract)
    if extract is not images_of and len(found) and not len(found) % len(drawn):
        found = found[:: len(found) // len(drawn)].clone()
    if len(found) != len(drawn):
        raise ConfigurationError(
            f"Drew {len(drawn)} items from {source.origin}, and its batches hold {len(found)} images: its collate_fn"
            " leaves some out or makes several of one. Write calibration_data=DATASET with one image an item."
        )
    return found


def images_of(batch: Any) -> Tensor:
    """The images of a batch, in the layouts that data sets commonly have.

    Args:
        batch: Images; a tuple or list that starts with images, as one tensor or as a list of them; or a dict with
            images under ``image``, ``images``, ``pixel_values``, ``img``, ``x`` or ``input``.

    Returns:
        Floating point, ``(N, C, H, W)``.

    Raises:
        ConfigurationError: If there are no images in these places.
        QuantizationError: If a pixel is NaN or infinite.

    Example:
        >>> images_of({"pixel_values": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2)}).shape
        torch.Size([2, 3, 8, 8])
    """
    match batch:
        case Mapping():
            found = next((batch[key] for key in _KEYS if key in batch), None)
        case [list() | tuple() as several, *_] if several and all(isinstance(each, Tensor) for each in several):
            found = _stacked(several)
        case [first, *_]:
            found = first
        case _:
            found = batch
    return _checked(found, batch)


class _Drawn(Dataset[Any]):
    """Some items of a data set; each item comes out the same whoever loads it, and whatever beside it."""

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
    """Seed the generators that transforms draw from, on the CPU, and put them back."""
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (transforms draw from the global one)
        torch.default_generator.manual_seed(seed)
        yield


def _length(loader: Any) -> int | None:
    """Items that can be fetched by index; None where only the order of the loader makes batches."""
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
            return loader_like(loader, loader.dataset)  # drops no smaller last batch
    return loader  # type: ignore[no-any-return]


def _collect(batches: Iterable[Any], source: CalibrationSource, extract: Extract, limit: int | None = None) -> Tensor:
    """The images of batches one after the other, until there are ``limit``."""
    found: list[Tensor] = []
    try:
        for batch in batches:
            prepared = batch if source.prepare is None else source.prepare(batch)
            found.append(_finite(extract(prepared), prepared).cpu())
            if limit is not None and sum(map(len, found)) >= limit:
                break
    except RuntimeError as error:
        # What PyTorch's default collate_fn says, here or from a worker.
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise _several_sizes(str(error).strip().splitlines()[-1]) from error
    if len({image.shape[1:] for image in found}) > 1:
        raise _several_sizes(", ".join(sorted({_shape(image[0]) for image in found})))
    return torch.cat(found) if found else torch.empty(0)


def _stacked(images: Any) -> Tensor:
    if len(sizes := sorted({_shape(image) for image in images})) > 1:
        raise _several_sizes(", ".join(sizes))
    return torch.stack(list(images))


def _several_sizes(found: str) -> ConfigurationError:
    return ConfigurationError(
        f"Calibration images have different sizes: {found}. Write a transform that resizes and crops them to the"
        " size that the network gets."
    )


def _check_enough(found: int, asked: int, origin: str) -> None:
    if found < asked:
        raise ConfigurationError(
            f"Asked for {asked} calibration images, found {found} in {origin}."
            f" Write calibration_images={found}, or calibration_data=DATASET for a larger one."
        )


def _checked(images: Any, batch: Any) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 3:
        raise ConfigurationError(
            "Expected a batch of images in floating point, (N, C, H, W): a tensor, the first of a tuple, or a dict"
            f" with one of {', '.join(_KEYS)}. Found {_describe(batch)}."
            ' Write images=FUNCTION from a batch to its images, such as images=lambda batch: batch["pixels"].'
        )
    return _finite(images, batch)


def _finite(images: Any, batch: Any) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim < 3:
        raise ConfigurationError(
            f"images=FUNCTION gave {_describe(images)} for {_describe(batch)}; expected images (N, C, H, W) as the"
            " network takes them."
        )
    if not images.isfinite().all():
        bad = int((~images.isfinite()).sum())
        raise QuantizationError(
            f"{bad} of {images.numel()} pixels of a calibration batch are NaN or infinite; ranges taken from them"
            " mean nothing. Look at the transform: a division by a standard deviation of 0, or a broken file."
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
