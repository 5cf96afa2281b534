"""Sources of calibration images: the user's own Trainer, DataModule or loaders, none of which is modified."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_quant.errors import ConfigurationError, QuantizationError

AnyDataset = Dataset[Any]
AnyLoader = DataLoader[Any]
CalibrationData = AnyDataset | AnyLoader | Tensor
Owner = pl.LightningDataModule | pl.LightningModule

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_EVALUATION_LOADERS = ("val_dataloader", "test_dataloader", "predict_dataloader")
_BATCH_SIZE = 32


@dataclass(frozen=True)
class CalibrationSource:
    """Source from which :func:`~lightning_quant.calibration.images.calibration_images` draws.

    Attributes:
        loader: DataLoader whose data set, collate_fn, batch size and workers are used, but not its order. Any other
            iterable of batches is read from its start.
        origin: Description of the source that follows "calibration images from".
        prepare: Function that applies Lightning's batch hooks to a batch, or None.
        plain: Whether the batches are plain images, which need neither hooks nor a step to prepare them.
    """

    loader: AnyLoader | Iterable[Any]
    origin: str
    prepare: Callable[[Any], Any] | None = None
    plain: bool = False


def from_trainer(
    trainer: pl.Trainer, module: pl.LightningModule, calibration_data: CalibrationData | None = None
) -> CalibrationSource:
    """Return the source of calibration images of a running Trainer.

    Args:
        trainer: Trainer whose loaders exist, that is from ``on_validation_start``, ``on_test_start``,
            ``on_predict_start`` or ``on_train_start`` on.
        module: LightningModule of the Trainer.
        calibration_data: Data to use instead of the Trainer's. Its batches pass through the same batch hooks; a tensor
            of images is used as it is.

    Raises:
        ConfigurationError: See :func:`calibration_source`.

    Example:
        >>> from lightning_quant import DigitsDataModule, ImageClassifier
        >>> class Look(pl.Callback):
        ...     def on_test_start(self, trainer, pl_module):
        ...         print(from_trainer(trainer, pl_module).origin)
        >>> quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        >>> trainer = pl.Trainer(callbacks=[Look()], accelerator="cpu", limit_test_batches=1, **quiet)
        >>> module = ImageClassifier(model_kwargs={"in_chans": 1})
        >>> _ = trainer.test(module, DigitsDataModule(), verbose=False)
        DigitsDataModule.calibration_dataset()
    """
    datamodule: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
    evaluation = [trainer.test_dataloaders, trainer.predict_dataloaders, trainer.val_dataloaders]
    source = calibration_source(
        calibration_data,
        datamodule,
        module,
        trainer.train_dataloader,
        [loaders for loaders in evaluation if loaders is not None],
    )
    return with_hooks(source, datamodule, module)


def calibration_source(
    calibration_data: CalibrationData | None = None,
    datamodule: pl.LightningDataModule | None = None,
    module: pl.LightningModule | None = None,
    train_loaders: Any = None,
    evaluation_loaders: Any = None,
) -> CalibrationSource:
    """Return the first available source of unlabeled calibration images.

    The candidates, in this order, are:

    1. ``calibration_data``.
    2. ``datamodule.calibration_dataset()``, which the DataModules of this package provide.
    3. The train split, with the transform of the evaluation data if both are data sets of the same class with a
       ``transform`` or ``transforms`` attribute, as in torchvision, below any ``Subset``. The transform is replaced in
       a shallow copy. A datamodule that cannot serve the train split yet gets ``setup("fit")``, since Lightning sets
       up only the stage that it runs.
    4. The evaluation data, with a warning.

    Args:
        calibration_data: Data set or DataLoader with batches like the Trainer's, or images ``(N, C, H, W)``.
        datamodule: DataModule of the user, already prepared (``prepare_data``).
        module: LightningModule of the user, whose loaders are used if there is no datamodule.
        train_loaders: Existing loaders of the train split. Default: those of datamodule or module.
        evaluation_loaders: Existing loaders of the evaluation data, preferred to those of datamodule and module.

    Raises:
        ConfigurationError: There is nothing to calibrate on, or the train split cannot be loaded.

    Example:
        >>> import torch
        >>> calibration_source(torch.zeros(4, 3, 8, 8)).origin
        'calibration_data (a tensor)'
    """
    if calibration_data is not None:
        return _from_calibration_data(calibration_data)
    if callable(getattr(datamodule, "calibration_dataset", None)):
        return _from_datamodule(datamodule)
    owners: list[Owner] = [owner for owner in (datamodule, module) if owner is not None]
    train = next(_flat(train_loaders), None)
    if train is None:
        train = next((loader for owner in owners for loader in _train_loaders(owner)), None)
    evaluation = _evaluation_loaders(evaluation_loaders, owners)
    if train is not None:
        return _from_train(train, evaluation)
    if (loader := next(evaluation, None)) is not None:
        origin = f"the evaluation data ({_class_of(loader)})"
        rank_zero_warn(
            f"There is no train split, so calibration images are taken from {origin}, which makes accuracy on the same"
            " data too optimistic. Write calibration_data=DATASET, or pass the Trainer a datamodule with a"
            " train_dataloader."
        )
        return CalibrationSource(loader, origin)
    raise ConfigurationError(
        "Found no images to calibrate on: no datamodule, no train_dataloader, no evaluation data."
        " Write calibration_data=DATASET (or a DataLoader, or images of shape (N, C, H, W)), or pass the Trainer"
        " a datamodule."
    )


def with_hooks(
    source: CalibrationSource, datamodule: pl.LightningDataModule | None, module: pl.LightningModule
) -> CalibrationSource:
    """Return the source with Lightning's batch hooks applied to its batches, as for the steps of a module.

    Example:
        >>> import torch
        >>> images = with_hooks(calibration_source(torch.zeros(4, 3, 8, 8)), None, pl.LightningModule())
        >>> images.prepare is None
        True
    """
    if source.plain:
        return source
    return replace(source, prepare=lambda batch: _transfer(batch, source.origin, datamodule, module))


def loader_like(loader: AnyLoader, dataset: AnyDataset) -> AnyLoader:
    """Create a loader over another data set, in order and without dropping items, otherwise like ``loader``.

    Example:
        >>> loader = DataLoader(range(10), batch_size=4, shuffle=True, drop_last=True)  # type: ignore[arg-type]
        >>> [batch.tolist() for batch in loader_like(loader, range(5))]  # type: ignore[arg-type]
        [[0, 1, 2, 3], [4]]
    """
    return DataLoader(
        dataset,
        # A loader with a custom batch_sampler has no batch_size.
        batch_size=loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or _BATCH_SIZE,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _from_calibration_data(data: CalibrationData) -> CalibrationSource:
    loader: AnyLoader
    match data:
        case Tensor():
            return CalibrationSource(
                DataLoader(TensorDataset(data), _BATCH_SIZE), "calibration_data (a tensor)", plain=True
            )
        case DataLoader():
            loader = data
        case Dataset():
            loader = DataLoader(data, _BATCH_SIZE)
        case _:
            raise ConfigurationError(
                f"calibration_data is a {type(data).__name__}, but expected a Dataset, a DataLoader or a Tensor of"
                " images (N, C, H, W)."
            )
    return CalibrationSource(loader, f"calibration_data ({_class_of(loader)})")


def _from_datamodule(datamodule: Any) -> CalibrationSource:
    origin = f"{type(datamodule).__name__}.calibration_dataset()"
    rank_zero_info(f"Calibration images from {origin}.")
    batch_size = getattr(datamodule, "batch_size", _BATCH_SIZE)
    workers = getattr(datamodule, "num_workers", 0)
    return CalibrationSource(DataLoader(datamodule.calibration_dataset(), batch_size, num_workers=workers), origin)


def _from_train(loader: Any, evaluation: Iterator[Any]) -> CalibrationSource:
    dataset = getattr(loader, "dataset", None)
    origin = f"the train split ({_class_of(loader)})"
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
        rank_zero_info(f"Calibration images from {origin}, the first ones, with the training transform.")
        return CalibrationSource(loader, origin)
    transformed = _with_evaluation_transform(dataset, [data for loader in evaluation for data in _chain(loader)])
    transform = "with the evaluation transform"
    if transformed is None:
        transform = "with the training transform, since no evaluation data of the same class have another `transform`"
    rank_zero_info(f"Calibration images from {origin}, {transform}.")
    selected: AnyDataset = loader.dataset if transformed is None else transformed
    if isinstance(loader.sampler, SubsetRandomSampler):
        selected = Subset(selected, list(loader.sampler.indices))  # the other items may be held out
    if selected is not dataset:
        loader = loader_like(loader, selected)
    return CalibrationSource(loader, f"{origin}, {transform.partition(',')[0]}")


def _with_evaluation_transform(dataset: Any, evaluation: list[Any]) -> Any | None:
    """Return a copy of a train data set with the evaluation transform, or None if no evaluation data set fits."""
    if names := [name for name in ("transform", "transforms") if hasattr(dataset, name)]:
        model = next((data for data in evaluation if type(data) is type(dataset)), None)
        if model is None:
            return None
        transformed = copy.copy(dataset)
        for name in names:
            setattr(transformed, name, getattr(model, name))
        return transformed
    if not isinstance(dataset, Subset) or (inner := _with_evaluation_transform(dataset.dataset, evaluation)) is None:
        return None
    transformed = copy.copy(dataset)
    transformed.dataset = inner
    return transformed


def _chain(loader: Any) -> Iterator[Any]:
    """Iterate over the data set of a loader and, if it is a Subset, the data sets below it."""
    dataset = getattr(loader, "dataset", None)
    yield dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
        yield dataset


def _train_loaders(owner: Owner) -> list[Any]:
    if not is_overridden("train_dataloader", owner):
        return []
    if isinstance(owner, pl.LightningDataModule):
        # Before setup, its data sets are missing or None.
        with suppress(Exception):
            loaders = list(_flat(owner.train_dataloader()))
            if loaders and all(getattr(loader, "dataset", loader) is not None for loader in loaders):
                return loaders
    try:
        if isinstance(owner, pl.LightningDataModule):
            owner.setup("fit")
        return list(_flat(owner.train_dataloader()))
    except QuantizationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"Calibration takes images from {type(owner).__name__}.train_dataloader(), which raised"
            f" {type(error).__name__}: {error}. Write calibration_data=DATASET to use other images."
        ) from error


def _evaluation_loaders(loaders: Any, owners: list[Owner]) -> Iterator[Any]:
    yield from _flat(loaders)
    for owner in owners:
        for name in _EVALUATION_LOADERS:
            if is_overridden(name, owner):
                with suppress(Exception):  # its stage may not be set up
                    yield from list(_flat(getattr(owner, name)()))


def _flat(loaders: Any) -> Iterator[Any]:
    """Iterate over the loaders in whatever Lightning accepts: a loader, lists, dicts, a CombinedLoader."""
    if loaders is None:
        return
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    yield from (loader for loader in combined.flattened if loader is not None)


def _class_of(loader: Any) -> str:
    """Return the class name of the images' data set, below any Subset."""
    return type([data if data is not None else loader for data in _chain(loader)][-1]).__name__


def _hook_owner(name: str, datamodule: pl.LightningDataModule | None, module: pl.LightningModule) -> Any:
    """Return the owner of a hook: the datamodule takes precedence over the module, as in Lightning."""
    return datamodule if datamodule is not None and is_overridden(name, datamodule) else module


def _transfer(batch: Any, origin: str, datamodule: pl.LightningDataModule | None, module: pl.LightningModule) -> Any:
    """Apply the batch hooks, in which some modules normalize, so that the batch is as the steps get it."""
    for name in _TRANSFER_HOOKS:
        owner = _hook_owner(name, datamodule, module)
        arguments = (module.device, 0) if name == "transfer_batch_to_device" else (0,)
        try:
            batch = getattr(owner, name)(batch, *arguments)
        except QuantizationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"{type(owner).__name__}.{name}, which prepares batches for the steps, raised {type(error).__name__} on"
                f" a batch of {origin}: {error}. Use data with batches like the Trainer's, or a tensor of images"
                " (N, C, H, W), which is used as it is: calibration_data=TENSOR."
            ) from error
    return batch
