"""Diffusers pipelines with a quantized denoiser: a folder in diffusers' layout, the denoiser as our artifact."""

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

# Module where diffusers finds the class of a quantized denoiser; it does not import modules that a folder names.
_HOME = "lightning_quant.export.denoiser"
WRITER = Writer("save_quantized_pipeline", partial(listed_files, index=INDEX), INDEX)
# Required arguments of Stable Diffusion's pipeline that may be None.
_OPTIONAL = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")


def save_quantized_pipeline(
    source: DiffusionModel | str | Path, folder: str | Path, network: nn.Module | None = None
) -> Path:
    """Save a pipeline with a quantized denoiser, for :func:`load_quantized_pipeline`.

    ``DiffusionPipeline.from_pretrained`` loads it too, after ``import lightning_quant.export.denoiser``.

    The denoiser's folder is written by :func:`lightning_quant.save_quantized`, with diffusers' ``config.json`` beside
    it; the rest is as in the float pipeline. An earlier folder is replaced once the new one is complete. In a
    distributed run rank 0 writes.

    Args:
        source: Float pipeline, as a folder or a name on the hub, or a DiffusionModel.
        folder: Folder to write; missing parents are created.
        network: Quantized denoiser; None takes that of ``source``.

    Returns:
        The folder.

    Raises:
        ConfigurationError: Folder with other files.
        UnsupportedModelError: Denoiser that is not quantized.
        QuantizationError: Denoiser whose quantizers have no ranges yet.

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
    """Load a diffusers pipeline from a folder that :func:`save_quantized_pipeline` wrote, on the CPU.

    Its images equal those of the saved pipeline bit for bit.

    Args:
        folder: Folder with ``model_index.json``.
        components: Components to use instead of those in the folder, and further arguments of the pipeline's
            ``from_pretrained``.

    Raises:
        CheckpointError: Folder whose denoiser is not quantized, or files that are missing, truncated or changed.
        ConfigurationError: A library that the pipeline needs is not installed.
    """
    from diffusers.utils.import_utils import is_accelerate_available

    contents = _quantized_folder(user_path(folder))
    library = "lightning_quant.accuquant.class_conditional" if contents.pipeline == OWN_PIPELINE else "diffusers"
    kind: Any = getattr(import_module(library), contents.pipeline)
    network = load_quantized(contents.components[contents.denoiser][0])
    import_module(_HOME)
    # Diffusers wants components that are null in the folder to be passed as None.
    absent = [key for key, entry in _index(contents.path).items() if entry == [None, None]]
    kwargs = {**dict.fromkeys(absent), contents.denoiser: network, **components}
    try:
        pipeline = kind.from_pretrained(contents.path, low_cpu_mem_usage=is_accelerate_available(), **kwargs)
    except ImportError as error:
        raise ConfigurationError(
            f"{contents.pipeline} needs a library that is not installed: {error}\nInstall it, or write"
            f" load_quantized_model({str(folder)!r}), which loads only the denoiser, the scheduler and the decoder."
        ) from error
    return pipeline


def load_quantized_model(folder: str | Path, **arguments: Any) -> DiffusionModel:
    """Load the denoiser and its scheduler from a folder that :func:`save_quantized_pipeline` wrote.

    The quantized counterpart of :func:`lightning_quant.accuquant.pipelines.load_float_pipeline`.

    Args:
        folder: Folder with ``model_index.json``.
        arguments: Further arguments of ``load_float_pipeline``, such as ``scheduler``.

    Raises:
        CheckpointError: Folder whose denoiser is not quantized, or files that are missing, truncated or changed.
    """
    contents = _quantized_folder(user_path(folder))
    network = load_quantized(contents.components[contents.denoiser][0])
    return load_float_pipeline(contents.path, network=network, **arguments)


def _quantized_folder(path: Path) -> PipelineFolder:
    settle(path, WRITER)
    if not (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} has no {INDEX}: give a folder that save_quantized_pipeline(model, folder) wrote; a denoiser"
            " alone is loaded with lightning_quant.load_quantized(folder)."
        )
    contents = read_folder(path)
    denoiser, _ = contents.components[contents.denoiser]
    if not (denoiser / QUANTIZED).is_file():
        raise CheckpointError(
            f"{denoiser} has no {QUANTIZED}, its denoiser is not quantized: load it with"
            f" diffusers.{contents.pipeline}.from_pretrained({str(path)!r}), or give a folder that"
            " save_quantized_pipeline wrote."
        )
    return contents


def _index(folder: Path | None) -> dict[str, Any]:
    """Return the content of ``model_index.json``; empty if there is none."""
    path = None if folder is None else folder / INDEX
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.is_file() else {}


def _header(model: DiffusionModel) -> dict[str, Any]:
    return {"_class_name": model.pipeline_class, "_diffusers_version": import_module("diffusers").__version__}


def _entry(component: Any) -> list[str]:
    """Return library and class of a component, as in ``model_index.json``."""
    kind = type(component)
    package = kind.__module__.split(".")[0]
    return [package if package in ("diffusers", "transformers") else kind.__module__, kind.__name__]


def _rest(model: DiffusionModel, new: Path, written: Any) -> dict[str, Any]:
    """Copy components that were not loaded, such as text encoders, from the model's folder; return their entries."""
    entries: dict[str, Any] = {}
    if model.kind == "sd":
        entries = {**{key: [None, None] for key in _OPTIONAL}, "requires_safety_checker": False}
    for key, entry in _index(model.folder).items():
        if key.startswith("_") or key in written or key in ("unet", "transformer"):
            continue
        entries[key] = entry
        if model.folder is not None and (model.folder / key).is_dir():
            shutil.copytree(model.folder / key, new / key)
    return entries
