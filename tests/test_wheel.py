"""The wheel and the source distribution, built from this checkout."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needs hatchling (pip install '.[test]')")

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def relative_files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob(pattern)}


def test_the_wheel_holds_every_config_and_every_module(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"lightning_quant/{name}" for name in relative_files(ROOT / "configs", "*.yaml")}
    assert len(configs) > 20
    assert configs == {name for name in names if name.startswith("lightning_quant/configs/")}
    assert relative_files(ROOT / "lightning_quant", "*.py") == {name for name in names if name.endswith(".py")}
    assert "lightning_quant/py.typed" in names


def test_the_source_distribution_holds_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("lightning_quant", "configs", "tests", "benchmarks", "docs"):
        expected = relative_files(ROOT / folder, "*.py") | relative_files(ROOT / folder, "*.yaml")
        assert expected
        assert expected <= names
