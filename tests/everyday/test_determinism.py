"""The same seed gives the same bits in another process; another number of threads nearly the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import determined

NAMES = pytest.mark.parametrize("name", list(determined.RUNS))


def run(folder: Path, hash_seed: int, threads: int) -> dict[str, list[str]]:
    """In a new process, with sets and dicts of another order."""
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(determined.__file__).parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, determined.__file__, str(folder), str(threads)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hashes: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return hashes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("determinism")


@pytest.fixture(scope="module")
def hashes(folder: Path) -> dict[str, list[str]]:
    return run(folder / "first", hash_seed=1, threads=1)


@pytest.fixture(scope="module")
def again(folder: Path) -> dict[str, list[str]]:
    return run(folder / "again", hash_seed=2, threads=1)


@pytest.fixture(scope="module")
def threaded(folder: Path) -> Path:
    run(folder / "threads", hash_seed=3, threads=2)
    return folder / "threads"


@NAMES
def test_the_same_seed_gives_the_same_weights_and_codes(
    name: str, hashes: dict[str, list[str]], again: dict[str, list[str]]
) -> None:
    assert again[name] == hashes[name]
    assert len({digest for run in hashes.values() for digest in run}) == 2 * len(hashes)


@NAMES
@pytest.mark.usefixtures("hashes")
def test_two_threads_give_what_one_gives(name: str, folder: Path, threaded: Path) -> None:
    one, two = (load_file(path / f"{name}.safetensors")["output"] for path in (folder / "first", threaded))
    # Sums in another order may turn a code, and training goes on from it.
    assert torch.linalg.vector_norm(two - one) <= 0.05 * torch.linalg.vector_norm(one)
