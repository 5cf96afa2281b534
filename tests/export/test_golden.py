"""Files that earlier versions wrote are read, and mean what they meant."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.everyday_projects import PROJECTS
from helpers.golden_files import GOLDEN
from lightning_quant import load_from_checkpoint, load_quantized, save_quantized
from lightning_quant.export.folder import DESCRIPTION, TENSORS, VERSION

VERSIONS = sorted(GOLDEN.iterdir())
golden = pytest.mark.parametrize("version", VERSIONS, ids=[path.name for path in VERSIONS])
methods = pytest.mark.parametrize("name", list(PROJECTS))


def test_the_version_that_is_written_now_has_its_files() -> None:
    assert (GOLDEN / f"v{VERSION}").is_dir(), (
        "a new version: run PYTHONPATH=tests python -m helpers.golden_files and commit what it writes"
    )


def check(version: Path, name: str, module: Any) -> None:
    expected = load_file(version / "expected.safetensors")[name]
    # Another processor may round a number to the next code; what is misread is off by the size of the outputs.
    torch.testing.assert_close(PROJECTS[name].outputs(module), expected, atol=0.05 * float(expected.std()), rtol=0)


@golden
@methods
def test_an_artefact_is_read(version: Path, name: str) -> None:
    check(version, name, load_quantized(version / name, model=PROJECTS[name].module()))


@golden
@methods
def test_a_checkpoint_is_read_without_pickled_code(version: Path, name: str) -> None:
    kind = type(PROJECTS[name].module())
    check(version, name, load_from_checkpoint(kind, version / f"{name}.ckpt", weights_only=True))


@golden
@methods
def test_a_checkpoint_is_tested(version: Path, name: str, tmp_path: Path) -> None:
    project = PROJECTS[name]
    module = project.module()
    trainer = project.trainer(tmp_path, project.callback())
    trainer.test(module, *project.data(), ckpt_path=version / f"{name}.ckpt", weights_only=True, verbose=False)
    check(version, name, module)


@methods
def test_what_was_read_is_written_as_the_same_bytes(name: str, tmp_path: Path) -> None:
    folder = GOLDEN / f"v{VERSION}" / name
    save_quantized(load_quantized(folder, model=PROJECTS[name].module()), tmp_path / "again")
    hashes = [hashlib.sha256((path / TENSORS).read_bytes()).hexdigest() for path in (folder, tmp_path / "again")]
    assert hashes[0] == hashes[1]
    assert json.loads((folder / DESCRIPTION).read_text())["sha256"] == hashes[0]
