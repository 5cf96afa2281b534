"""The pictures of a calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.vits import VitData, VitModule, calibration, finished, images, quiet, swin, vit
from lightning_quant import CalibrationPictures, IGQViT
from lightning_quant.errors import ConfigurationError
from lightning_quant.report import draw_calibration


def test_an_allocation_has_a_budget_curve_and_ranges(tmp_path: Path) -> None:
    found = finished(calibration(vit(), images(4)))
    written = draw_calibration(found, tmp_path / "new")
    assert [path.name for path in written] == ["budget.png", "channel_ranges.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_without_allocation_or_groups_there_is_less_to_draw(tmp_path: Path) -> None:
    fixed = finished(calibration(swin(), images(2, 16, 3), allocate=False))
    (path,) = draw_calibration(fixed, tmp_path, layer="layers.0.blocks.1.attn.qkv")
    assert path.name == "channel_ranges.png"
    assert draw_calibration(finished(calibration(vit(), images(2), scheme="layer_wise")), tmp_path) == []


def test_a_layer_without_groups_is_refused(tmp_path: Path) -> None:
    found = finished(calibration(vit(), images(4), allocate=False))
    with pytest.raises(ConfigurationError, match=r"layer='head' has no groups: expected one of blocks.0.attn.qkv"):
        draw_calibration(found, tmp_path, layer="head")


def test_the_callback_draws_after_a_test(tmp_path: Path) -> None:
    settings = IGQViT(groups=4, calibration_images=8, allocate=False)
    quiet(tmp_path, settings, CalibrationPictures(str(tmp_path / "pictures"))).test(VitModule(), VitData())
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["channel_ranges.png"]
