"""Files of a folder of trajectories: a description in JSON, and tensors that are read by rows."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_quant.accuquant.trajectories import Trajectories
from lightning_quant.errors import CheckpointError
from lightning_quant.nn.structure import weights_hash
from lightning_quant.utilities.files import whole_file
from lightning_quant.utilities.hashing import fingerprint
from lightning_quant.utilities.paths import check_writable

if TYPE_CHECKING:
    from lightning_quant.accuquant.denoiser import Denoiser
    from lightning_quant.accuquant.samplers import Sampler

VERSION = 1
DESCRIPTION = "trajectories.json"
STATES, OUTPUTS = "states", "outputs"
_SHA = "sha256"


def describe(denoiser: Denoiser, sampler: Sampler, shape: Sequence[int], seed: int) -> dict[str, Any]:
    """Describe, for JSON, what determines float trajectories beside the images' numbers and conditioning.

    Args:
        denoiser: Denoiser around the float network.
        sampler: Sampler that takes the steps.
        shape: Shape (C, H, W) of a state.
        seed: Seed of the noise.
    """
    scheduler = sampler.describe()
    described = {
        "format": "lightning_quant trajectories",
        "version": VERSION,
        "model": weights_hash(denoiser.network),
        "step count": scheduler.pop("steps", len(sampler.timesteps)),
        "scheduler": scheduler.pop("scheduler", type(sampler).__name__),
        "options": scheduler,
        "guidance": denoiser.guidance,
        "seed": seed,
        "shape": list(shape),
    }
    return dict(json.loads(json.dumps(described)))


def check_description(folder: Path, described: Mapping[str, Any]) -> None:
    """Write the description of a folder's trajectories, or compare it with the existing one.

    Raises:
        CheckpointError: Trajectories with another description, or a damaged description; the message names the
            differences.
        ConfigurationError: Folder that is not writable.
    """
    path = folder / DESCRIPTION
    if path.is_file():
        _compare(path, described)
        return
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _compare(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if a folder's trajectories have another description."""
    remedy = f"delete the folder {path.parent}, or write cache_dir=ANOTHER_FOLDER."
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        differences = list(_differences(_flat(description), _flat(expected)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is truncated or changed ({error}): {remedy}") from error
    if differences:
        # Lists such as the timesteps are shown only if nothing else differs.
        scalars = [difference for difference in differences if not isinstance(difference[1], list)] or differences
        shown = "; ".join(f"{name} {_shown(old)} there, {_shown(new)} here" for name, old, new in scalars)
        raise CheckpointError(f"The trajectories in {path.parent} have other settings ({shown}): {remedy}")


def _flat(described: Mapping[str, Any]) -> dict[str, Any]:
    options = {f"the scheduler's {name}": value for name, value in described["options"].items()}
    return {**described, "options": None, **options}


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in [*expected, *(name for name in found if name not in expected)]:
        if found.get(name) != expected.get(name):
            yield name, found.get(name), expected.get(name)


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) else reprlib.repr(value)


def write(path: Path, trajectories: Trajectories) -> None:
    """Write a file of trajectories atomically, with the steps of an image next to each other."""
    tensors = {STATES: trajectories.states.transpose(0, 1).contiguous()}
    if trajectories.outputs is not None:
        tensors[OUTPUTS] = trajectories.outputs.transpose(0, 1).float().contiguous()
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {_SHA: _sha(tensors)})


def intact(path: Path) -> bool:
    """Return whether a file exists and is undamaged; warn if it is damaged."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(_SHA)
        if _sha(load_file(path)) == expected:
            return True
        problem = "its SHA-256 is not the recorded one"
    except (SafetensorError, OSError) as error:
        problem = str(error)
    rank_zero_warn(f"{path} is truncated or changed ({problem}): its trajectories are generated again.")
    return False


def read_row(path: Path, name: str, row: int, start: int, stop: int) -> Tensor:
    """Read the states or outputs (stop - start, C, H, W) of one image."""
    try:
        with safe_open(path, framework="pt") as file:
            rows: Tensor = file.get_slice(name)[row : row + 1, start:stop]
            return rows[0]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} was removed or damaged during the run ({error}): start again, which generates its trajectories"
            " again."
        ) from error


def _sha(tensors: Mapping[str, Tensor]) -> str:
    # One digest for all tensors: safetensors writes metadata in any order, and equal trajectories must be equal files.
    return hashlib.sha256(repr([(name, fingerprint(tensors[name])) for name in sorted(tensors)]).encode()).hexdigest()
