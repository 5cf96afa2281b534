"""What `PYTHONPATH=tests python -m helpers.golden_files` wrote when the format was new; it has to be read for ever.

A new version of the format gets a new folder; the old ones stay.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.everyday_projects import PROJECTS
from lightning_quant import save_quantized
from lightning_quant.export.folder import VERSION

GOLDEN = Path(__file__).parents[1] / "golden"


def make(folder: Path) -> None:
    """A checkpoint and an artefact of each method, and what the modules give for inputs that are always the same."""
    torch.set_num_threads(1)
    expected = {}
    for name, project in PROJECTS.items():
        with tempfile.TemporaryDirectory() as run:
            module = project.fitted_and_tested(Path(run))
            checkpoint = project.saved(module, Path(run))
            checkpoint.rename(folder / f"{name}.ckpt")
        save_quantized(module, folder / name)
        expected[name] = project.outputs(module).contiguous()
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    new = GOLDEN / f"v{VERSION}"
    # Never over one that is there.
    new.mkdir()
    make(new)
