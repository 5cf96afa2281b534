"""What data an analysis takes: all that Lightning's test takes, and lists of batches; it reads them twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from helpers.networks import Images, SmallNet, fitted, quantization, trainer
from lightning_quant import analyze
from lightning_quant.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def analyzed(data: Any, folder: Path) -> dict[str, float]:
    """Noise of the inputs, by layer."""
    module = fitted(quantization(), default_root_dir=folder)
    found = analyze(module, data, folder, sensitivity=False, trainer=trainer())
    return {layer.name: layer.tensors["input"].sqnr for layer in found.layers}


def test_a_loader_is_taken_in_the_place_of_a_datamodule(tmp_path: Path) -> None:
    loader = DataLoader(Images(), batch_size=8)
    found = analyzed(loader, tmp_path)
    assert len(found) == 4
    assert analyzed(list(loader), tmp_path) == analyzed(None, tmp_path) == pytest.approx(found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1]), "is a list_iterator, which cannot be read twice, .* pass a DataLoader"),
        (Images(), r"is a Images, which has no batches: write DataLoader\(dataset"),
        (3, "is a int, which cannot be read twice"),
    ],
)
def test_data_that_is_not_in_batches_is_refused_before_the_work(data: Any, message: str, tmp_path: Path) -> None:
    module = SmallNet()
    with pytest.raises(ConfigurationError, match=message):
        analyze(module, data, tmp_path, trainer=trainer(quantization()))
    assert not list(tmp_path.iterdir())
