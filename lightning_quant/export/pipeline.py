"""Pipelines of diffusers with a quantized denoiser: a folder as diffusers writes it, the denoiser as our artefact."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_quant.accuquant.pipeline_folder import INDEX, OWN_PIPELINE, QUANTIZED, PipelineFolder, read_folder
from lightning_quant.accuquant.pipelines import DiffusionModel, load_float_pipeline
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.export.artifact import load_quantized, save_quantized
from lightning_quant.utilities.files import Writer, check_replaceable, list_files, listed_files, settle, whole_folder
from lightning_quant.utilities.paths import user_path

# Where diffusers finds the class of a quantized denoiser; it imports nothing that a folder names.
_HOME = "lightning_quant.export.denoiser"
WRITER = Writer("save_quantized_pipeline", partial(listed_files, index=INDEX), INDEX)
# What the constructor of Stable Diffusion's pipeline asks for, where it may be None.
_OPTIONAL = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")


def save_quantized_pipeline(
    source: DiffusionModel | str | Path, folder: str | Path, network: nn.Module | None = None
) -> Path:
    """Write a pipeline whose denoiser is quantized, for :func:`load_quantized_pipeline`.

    ``DiffusionPipeline.from_pretrained`` opens it too, after ``import lightning_quant.export.denoiser``.

    The denoiser's folder is that of :func:`lightning_quant.save_quantized` with diffusers' ``config.json`` beside it;
    all else is as in the float pipeline. A folder that was written before is replaced once the new one is complete. In
    a distributed run rank 0 writes.

    Args:
        source: the float pipeline, a folder or a name on the hub; or a model with what surrounds the denoiser.
        folder: where to; its parents are made.
        network: the quantized denoiser; None for that of ``source``.

    Returns:
        the folder.

    Raises:
        ConfigurationError: a folder with other files.
        UnsupportedModelError: a denoiser that is not quantized.
        QuantizationError: none of its quantizers has a range yet.

    Example:
        >>> import tempfile
        >>> from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
        >>> from lightning_quant.nn import swap
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> pipeline = DDIMPipeline(UNet2DModel(**sizes, **blocks, add_attention=False), DDIMScheduler())
        >>> layer = swap(pipeline.unet.conv_in, weight_quantizer=FixedQuantizer(4, symmetric=False, axis=0))
        >>> layer.weight_quantizer.initialize(layer.weight)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     opened = load_quantized_pipeline(save_quantized_pipeline(load_float_pipeline(pipeline), folder))
        >>> type(opened).__name__, opened.unet.conv_in.weight_quantizer
        ('DDIMPipeline', FixedQuantizer(bits=4, ready=True))
    """
    target = user_path(folder)
    check_replaceable(target, WRITER)
    if getattr(rank_zero_only, "rank", 0):
        return target
    model = source if isinstance(source, DiffusionModel) else load_float_pipeline(source, network=network)
    quantized: Any = model.network if network is None else network
    name = "transformer" if model.kind == "dit" else "unet"
    with whole_folder(target, WRITER) as new:
        save_quantized(quantized, new / name)
        quantized.save_config(new / name)
        saved = {"scheduler": model.scheduler, **model.components}
        for key, component in saved.items():
            component.save_pretrained(new / key)
        index = {name: [_HOME, "QuantizedDenoiser"], **{key: _entry(component) for key, component in saved.items()}}
        content = {**_header(model), **_rest(model, new, index.keys()), **index}
        (new / INDEX).write_text(json.dumps(content), encoding="utf-8")
        list_files(new, INDEX)
    return target


def load_quantized_pipeline(folder: str | Path, **components: Any) -> Any:
    """The pipeline of diffusers in a folder that :func:`save_quantized_pipeline` wrote, on the CPU.

    Its images are those of the pipeline with the denoiser that was saved, bit for bit.

    Args:
        folder: with ``model_index.json``.
        components: others in place of those in the folder, and whatever else the pipeline's ``from_pretrained`` takes.

    Raises:
        CheckpointError: a folder whose denoiser is not quantized, or files that are missing, cut off or changed.
        ConfigurationError: a library is missing that the pipeline needs.
    """
    from diffusers.utils.import_utils import is_accelerate_available

    found = _quantized_folder(user_path(folder))
    library = "lightning_quant.accuquant.class_conditional" if found.pipeline == OWN_PIPELINE else "diffusers"
    kind: Any = getattr(import_module(library), found.pipeline)
    network = load_quantized(found.components[found.denoiser][0])
    import_module(_HOME)
    # What the folder has as null is not taken for given.
    absent = [key for key, entry in _index(found.path).items() if entry == [None, None]]
    given = {**dict.fromkeys(absent), found.denoiser: network, **components}
    try:
        pipeline = kind.from_pretrained(found.path, low_cpu_mem_usage=is_accelerate_available(), **given)
    except ImportError as error:
        raise ConfigurationError(
            f"{found.pipeline} needs a library that is not installed: {error}\nInstall it, or write"
            f" load_quantized_model({str(folder)!r}), which loads the denoiser, the scheduler and the decoder alone."
        ) from error
    return pipeline


def load_quantized_model(folder: str | Path, **arguments: Any) -> DiffusionModel:
    """Load the denoiser and its sampler from a folder that :func:`save_quantized_pipeline` wrote.

    The quantized twin of :func:`lightning_quant.accuquant.pipelines.load_float_pipeline`.

    Args:
        folder: with ``model_index.json``.
        arguments: others of ``load_float_pipeline``, as ``scheduler``.

    Raises:
        CheckpointError: a folder whose denoiser is not quantized, or files that are missing, cut off or changed.
    """
    found = _quantized_folder(user_path(folder))
    return load_float_pipeline(found.path, network=load_quantized(found.components[found.denoiser][0]), **arguments)


def _quantized_folder(path: Path) -> PipelineFolder:
    settle(path, WRITER)
    if not (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} has no {INDEX}: give a folder that save_quantized_pipeline(model, folder) wrote; a denoiser"
            " alone is loaded with lightning_quant.load_quantized(folder)."
        )
    found = read_folder(path)
    denoiser, _ = found.components[found.denoiser]
    if not (denoiser / QUANTIZED).is_file():
        raise CheckpointError(
            f"{denoiser} has no {QUANTIZED}, its denoiser is not quantized: load it with"
            f" diffusers.{found.pipeline}.from_pretrained({str(path)!r}), or give a folder that"
            " save_quantized_pipeline wrote."
        )
    return found


def _index(folder: Path | None) -> dict[str, Any]:
    """What ``model_index.json`` says; empty where there is none."""
    path = None if folder is None else folder / INDEX
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.is_file() else {}


def _header(model: DiffusionModel) -> dict[str, Any]:
    return {"_class_name": model.pipeline_class, "_diffusers_version": import_module("diffusers").__version__}


def _entry(component: Any) -> list[str]:
    """Library and class, as diffusers writes them."""
    kind = type(component)
    package = kind.__module__.split(".")[0]
    return [package if package in ("diffusers", "transformers") else kind.__module__, kind.__name__]


def _rest(model: DiffusionModel, new: Path, known: Any) -> dict[str, Any]:
    """Entries of what was not loaded, as text encoders are not: copied from the folder that the model came from."""
    entries: dict[str, Any] = {}
    if model.kind == "sd":
        entries = {**{key: [None, None] for key in _OPTIONAL}, "requires_safety_checker": False}
    for key, entry in _index(model.folder).items():
        if key.startswith("_") or key in known or key in ("unet", "transformer"):
            continue
        entries[key] = entry
        if model.folder is not None and (model.folder / key).is_dir():
            shutil.copytree(model.folder / key, new / key)
    return entries
