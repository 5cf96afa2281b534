"""The two files of an artifact: tensors in safetensors, the rest in JSON, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_quant.errors import CheckpointError
from lightning_quant.utilities.files import Writer, left_elsewhere, settle, whole_folder
from lightning_quant.utilities.hashing import file_hash

FORMAT, VERSION = "lightning_quant", 2
# Version 1 has no hash of the description.
READ = (1, 2)
TENSORS, DESCRIPTION = "model.safetensors", "quantization.json"


@dataclass(frozen=True)
class Description:
    """Meaning of the tensors of an artifact.

    Attributes:
        modules: Extra states of the quantizers by slot, for each quantized layer and opened attention.
        packed: Bits, shape and dtype of each weight that is stored as codes.
        tied: Names of tensors that are stored under another name.
        build: Recipe of the float network, see ``build.construct``; None if the caller must provide the network.
        float32_bytes: Size in bytes of the float network's weights and buffers in FP32.
    """

    modules: dict[str, dict[str, list[int]]]
    packed: dict[str, dict[str, Any]]
    tied: dict[str, str]
    build: dict[str, Any] | None
    float32_bytes: int


def written_files(folder: Path) -> tuple[str, ...]:
    """Return the names of a folder's files that :func:`write_folder` wrote, according to its description.

    Example:
        >>> written_files(Path("no-such-folder"))
        ()
    """
    try:
        is_artifact = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()
    return (TENSORS, DESCRIPTION) if is_artifact else ()


WRITER = Writer("save_quantized", written_files, DESCRIPTION)


def write_folder(folder: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """Write both files beside the folder, then put them in its place."""
    with whole_folder(folder, WRITER) as new:
        save_file(dict(tensors), new / TENSORS)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "lightning_quant": import_module("lightning_quant").__version__,
            "sha256": file_hash(new / TENSORS),
            "packed_bytes": (new / TENSORS).stat().st_size,
            **asdict(description),
        }
        content["description_sha256"] = description_digest(content)
        (new / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        # safetensors writes files that only the owner can read, whatever the umask.
        (new / TENSORS).chmod((new / DESCRIPTION).stat().st_mode)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], Description]:
    """Read the tensors, on the CPU, and their description.

    Raises:
        CheckpointError: A file that is missing, truncated or changed, or has an unknown version.
    """
    settle(folder, WRITER)
    missing = [name for name in (TENSORS, DESCRIPTION) if not (folder / name).is_file()]
    if missing:
        left = left_elsewhere(folder)
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}: give a folder that lightning_quant.save_quantized(model,"
            " folder) wrote."
            + (
                f"\nBeside it lies {', '.join(path.name for path in left)}, written by a process on another machine: if"
                f" that process was stopped while writing, rename a folder that has both files to {folder.name}."
                if left
                else ""
            )
        )
    again = "copy the folder again, or write it again with lightning_quant.save_quantized(model, folder)."
    try:
        content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        version = content["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} is truncated or changed ({error}): {again}") from error
    if version not in READ:
        raise CheckpointError(
            f"{folder / DESCRIPTION} has version {version}, this lightning_quant reads versions up to"
            f" {VERSION}: load it with"
            f" lightning_quant {content.get('lightning_quant')}, which wrote it."
        )
    if version > 1 and description_digest(content) != content.get("description_sha256"):
        raise CheckpointError(f"{folder / DESCRIPTION} is changed (its sha256 is not the recorded one): {again}")
    try:
        description = Description(**{name: content[name] for name in Description.__dataclass_fields__})
        if file_hash(folder / TENSORS) != content["sha256"]:
            raise ValueError("its sha256 is not the recorded one")
        return load_file(folder / TENSORS), description
    except (ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder / TENSORS} is truncated or changed ({error}): {again}") from error


def description_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the JSON's content without its own digest.

    Example:
        >>> description_digest({"a": 1, "b": 2}) == description_digest({"b": 2, "a": 1, "description_sha256": "x"})
        True
    """
    # Hash the content as it is read back: JSON turns all keys into strings.
    rest = json.loads(json.dumps({key: value for key, value in content.items() if key != "description_sha256"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
