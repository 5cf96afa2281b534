"""Folders of diffusers pipelines: listing and loading their components.

Components are loaded one by one and not through the pipeline's class, because Stable Diffusion's class needs
transformers even if no prompt is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_quant.accuquant.samplers import SUPPORTED as SCHEDULERS
from lightning_quant.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from lightning_quant.utilities.paths import user_path

INDEX = "model_index.json"
# File in the folder of a quantized denoiser; lightning_quant.export writes it.
QUANTIZED = "quantization.json"
DENOISERS, DECODERS = ("unet", "transformer"), ("vqvae", "vae")
DENOISER_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
DECODER_CLASSES = ("VQModel", "AutoencoderKL")
OWN_PIPELINE = "ClassConditionalLDMPipeline"
PIPELINES = (
    "DDPMPipeline",
    "DDIMPipeline",
    "PNDMPipeline",
    "LDMPipeline",
    OWN_PIPELINE,
    "StableDiffusionPipeline",
    "DiTPipeline",
)
_CONFIGS = ("config.json", "scheduler_config.json")


@dataclass(frozen=True)
class PipelineFolder:
    """Contents of a pipeline's folder.

    Attributes:
        path: Path of the folder.
        pipeline: Name of the pipeline's class; empty without ``model_index.json``.
        components: Folder and class name of each component.
        alone: Whether the folder itself is the denoiser's.
    """

    path: Path
    pipeline: str
    components: Mapping[str, tuple[Path, str]]
    alone: bool = False

    @property
    def denoiser(self) -> str:
        """Name of the component that denoises.

        Raises:
            ConfigurationError: Folder without a denoiser.
        """
        denoiser = next((name for name in DENOISERS if name in self.components), None)
        if denoiser is None:
            raise ConfigurationError(
                f"{self.path} has no denoiser, found {', '.join(self.components) or 'no component'}: give the folder of"
                f" a diffusers pipeline with {INDEX} and {' or '.join(DENOISERS)}/, or that of a"
                f" {' or '.join(DENOISER_CLASSES)} with its config.json."
            )
        return denoiser

    @property
    def decoder(self) -> str | None:
        """Name of the component that decodes latents; None without one."""
        return next((name for name in DECODERS if name in self.components), None)


def read_folder(path: Path) -> PipelineFolder:
    """List the components of a folder without loading them.

    Args:
        path: Folder with ``model_index.json``; or with subfolders such as ``unet/`` or ``transformer/`` and
            ``scheduler/``; or with the ``config.json`` of a denoiser.

    Raises:
        UnsupportedModelError: Pipeline of another class.
        CheckpointError: JSON that is truncated or changed.
    """
    if (path / INDEX).is_file():
        index = _json(path / INDEX)
        pipeline = index.get("_class_name")
        name = pipeline[-1] if isinstance(pipeline, list) else str(pipeline)
        if name not in PIPELINES:
            raise UnsupportedModelError(
                f"{path} is a {name}; AccuQuant knows {', '.join(PIPELINES)}. If its denoiser takes no conditions"
                " beside class_labels or encoder_hidden_states, give the denoiser's folder, and the scheduler as"
                " scheduler=."
            )
        classes = {key: entry[1] for key, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
        components = {key: (path / key, str(kind)) for key, kind in classes.items() if kind and key[0] != "_"}
        return PipelineFolder(path, name, components)
    if (path / "config.json").is_file():
        denoiser = {DENOISERS[0]: (path, _class_name(path))}
        scheduler = {"scheduler": (path, _class_name(path, _CONFIGS[1:]))} if (path / _CONFIGS[1]).is_file() else {}
        return PipelineFolder(path, "", {**_below(path), **denoiser, **scheduler}, alone=True)
    return PipelineFolder(path, "", _below(path))


def _below(path: Path) -> dict[str, tuple[Path, str]]:
    names = (*DENOISERS, *DECODERS, "scheduler", "class_embedding")
    present = [name for name in names if any((path / name / config).is_file() for config in _CONFIGS)]
    return {name: (path / name, _class_name(path / name)) for name in present}


def _class_name(path: Path, configs: tuple[str, ...] = _CONFIGS) -> str:
    config = _json(next(path / name for name in configs if (path / name).is_file()))
    return str(config.get("_class_name"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of an object")
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated or changed ({error}): copy the pipeline's folder again.") from error
    return content


def load_denoiser(folder: PipelineFolder) -> Any:
    """Load the denoiser of a folder, in FP32 and eval mode.

    Raises:
        UnsupportedModelError: Denoiser of another class.
        ConfigurationError: Quantized denoiser.
        CheckpointError: Weights that are missing or belong to another network.
    """
    path, name = folder.components[folder.denoiser]
    if name == "Transformer2DModel" and (path / "config.json").is_file():
        # The DiT on the hub was saved under this name, before it had its own class.
        name = "DiTTransformer2DModel" if _json(path / "config.json").get("norm_type") == "ada_norm_zero" else name
    if (path / QUANTIZED).is_file():
        raise ConfigurationError(
            f"{path} holds a quantized denoiser: write"
            f" lightning_quant.load_quantized_pipeline({str(folder.path)!r}), or for a DiffusionModel"
            " lightning_quant.export.pipeline.load_quantized_model."
        )
    if name not in DENOISER_CLASSES:
        raise UnsupportedModelError(
            f"The denoiser in {path} is a {name}; supported are {', '.join(DENOISER_CLASSES)}. Your own network can be"
            " passed as a module, with load_float_pipeline(folder, network=...)."
        )
    return load_component(path, name)


def load_component(path: Path, name: str) -> Any:
    """Load a network from its folder by class name, in FP32 and eval mode.

    Raises:
        CheckpointError: Folder that cannot be loaded.
    """
    import torch
    from diffusers.utils.import_utils import is_accelerate_available

    try:
        if name == "ClassEmbedding":
            kind: Any = import_module("lightning_quant.accuquant.class_conditional").ClassEmbedding
        else:
            kind = getattr(import_module("diffusers"), name)
        network: Any = kind.from_pretrained(
            path, torch_dtype=torch.float32, low_cpu_mem_usage=is_accelerate_available()
        )
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the folder of a {name} that diffusers can load: {error}\nCopy the folder again, with its"
            " config.json and its weights."
        ) from error
    return network.eval()


def load_scheduler(folder: PipelineFolder, given: Any) -> Any:
    """Return the given scheduler, an object or a folder, or else load that of the pipeline.

    Raises:
        ConfigurationError: Folder without a scheduler.
        UnsupportedModelError: Scheduler of a class without a sampler here.
    """
    if given is not None and not isinstance(given, str | Path):
        return given
    path, name = folder.components.get("scheduler", (folder.path / "scheduler", ""))
    if given is not None:
        path = user_path(given)
        path = path if (path / _CONFIGS[1]).is_file() else path / "scheduler"
    if not (path / _CONFIGS[1]).is_file():
        where = f"{folder.path} has no scheduler" if given is None else f"scheduler={str(given)!r} has none"
        raise ConfigurationError(
            f"{where}: there is no {path / _CONFIGS[1]}. Add the folder scheduler/ that the model was trained with"
            ' (scheduler.save_pretrained(folder + "/scheduler")), or write load_float_pipeline(folder,'
            f" scheduler=DDIMScheduler(...)); supported are {', '.join(SCHEDULERS)}."
        )
    config = _json(path / _CONFIGS[1])
    name = str(config.get("_class_name") or name)
    if name not in SCHEDULERS:
        raise UnsupportedModelError(
            f"{path} holds a {name}; supported are {', '.join(SCHEDULERS)}. Write load_float_pipeline(folder,"
            " scheduler=DDIMScheduler.from_config(config)) with one of these that suits the model."
        )
    return getattr(import_module("diffusers"), name).from_config(config)


def as_the_pipeline_has_it(scheduler: Any, pipeline: str) -> Any:
    """Return the scheduler with the changes that the pipeline's constructor makes, or unchanged.

    ``DDIMPipeline`` turns every scheduler into a DDIM one, and Stable Diffusion's constructor corrects two settings of
    old folders; without these changes images would differ from those of the pipeline.
    """
    config = scheduler.config
    if pipeline == "DDIMPipeline" and type(scheduler).__name__ != "DDIMScheduler":
        return import_module("diffusers").DDIMScheduler.from_config(config)
    if pipeline == "StableDiffusionPipeline":
        corrected = {"steps_offset": 1, "clip_sample": False}
        changes = {key: value for key, value in corrected.items() if config.get(key, value) != value}
        return type(scheduler).from_config(config, **changes) if changes else scheduler
    return scheduler
