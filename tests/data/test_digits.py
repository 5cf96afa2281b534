from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from lightning_quant.data import DigitsDataModule, held_out_split
from lightning_quant.errors import ConfigurationError


def _rows(dataset: Any) -> list[bytes]:
    return [image.numpy().tobytes() for image, _ in dataset]


def test_the_splits_together_are_all_digits_once() -> None:
    data = DigitsDataModule(validation_fraction=0.2)
    loaders: list[Any] = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    assert [len(loader.dataset) for loader in loaders] == [1150, 287, 360]
    everything: ConcatDataset[Any] = ConcatDataset([loader.dataset for loader in loaders])
    labels = torch.cat([labels for _, labels in DataLoader(everything, batch_size=512)])
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_every_class_is_in_every_split_in_proportion() -> None:
    data = DigitsDataModule()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        labels = torch.cat([labels for _, labels in loader])
        assert torch.bincount(labels, minlength=10).min() > 0.08 * len(labels)


def test_training_images_have_mean_zero_and_variance_one() -> None:
    images, _ = next(iter(DataLoader(DigitsDataModule().calibration_dataset(), batch_size=2000)))
    assert images.shape[1:] == (1, 8, 8)
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


def test_the_seed_moves_validation_but_never_the_test_images() -> None:
    first, second = DigitsDataModule(seed=0), DigitsDataModule(seed=1)
    assert _rows(first.test_dataloader().dataset) == _rows(second.test_dataloader().dataset)
    assert _rows(first.calibration_dataset()) == _rows(DigitsDataModule(seed=0).calibration_dataset())
    assert _rows(first.calibration_dataset()) != _rows(second.calibration_dataset())


def test_setup_twice_loads_once() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    before = data.calibration_dataset()
    data.setup("validate")
    data.setup("fit")
    assert data.calibration_dataset() is before


def test_nothing_held_out_means_no_validation_loader() -> None:
    data = DigitsDataModule(validation_fraction=0)
    assert data.val_dataloader() == []
    assert len(data.calibration_dataset()) == 1437  # type: ignore[arg-type]


def test_no_training_batch_is_smaller_than_asked_for() -> None:
    data = DigitsDataModule(batch_size=100)
    assert {len(labels) for _, labels in data.train_dataloader()} == {100}
    assert len(next(iter(DigitsDataModule(batch_size=5000).train_dataloader()))[1]) == 1293


def test_held_out_is_a_partition_and_depends_on_the_seed_only() -> None:
    labels = [index % 3 for index in range(60)]
    kept, held = held_out_split(labels, 12, seed=3)
    assert sorted(kept + held) == list(range(60))
    assert [sum(labels[index] == label for index in held) for label in range(3)] == [4, 4, 4]
    assert (kept, held) == held_out_split(labels, 12, seed=3)
    assert held != held_out_split(labels, 12, seed=4)[1]


@pytest.mark.parametrize("held_out", [2, 59, 60, 100])
def test_a_split_without_every_class_is_refused(held_out: int) -> None:
    with pytest.raises(ConfigurationError, match=f"Cannot hold out {held_out} of 60 images of 3 classes"):
        held_out_split([index % 3 for index in range(60)], held_out, seed=0)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"validation_fraction": 1.0}, r"validation_fraction in \[0, 1\), but found 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int], found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        DigitsDataModule(**arguments)  # type: ignore[arg-type]


def test_the_training_is_shuffled_anew_each_epoch_and_evaluation_is_not() -> None:
    data = DigitsDataModule(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    training = data.train_dataloader()
    first, second = ([label for _, labels in training for label in labels.tolist()] for _ in range(2))
    assert first != second
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert isinstance(loader, DataLoader)
        first, second = ([label for _, labels in loader for label in labels.tolist()] for _ in range(2))
        assert first == second
