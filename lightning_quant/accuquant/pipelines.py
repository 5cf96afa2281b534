"""Diffusion models for AccuQuant, from diffusers pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.decoding import Decoder, to_images
from lightning_quant.accuquant.denoiser import Conditioning, Denoiser, check_denoiser
from lightning_quant.accuquant.pipeline_folder import (
    DECODER_CLASSES,
    DECODERS,
    DENOISERS,
    INDEX,
    OWN_PIPELINE,
    PipelineFolder,
    as_the_pipeline_has_it,
    load_component,
    load_denoiser,
    load_scheduler,
    read_folder,
)
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.utilities.paths import user_path

Kind = Literal["ddpm", "ldm", "ldm_class", "sd", "dit"]
# Default guidance of the diffusers pipelines, and of the class-conditional LDM in its paper.
_GUIDANCE: dict[Kind, float] = {"ldm_class": 3.0, "sd": 7.5, "dit": 4.0}
_PIPELINES: dict[Kind, str] = {
    "ldm": "LDMPipeline",
    "ldm_class": OWN_PIPELINE,
    "sd": "StableDiffusionPipeline",
    "dit": "DiTPipeline",
}


@dataclass(frozen=True)
class DiffusionModel:
    """Denoiser, scheduler and further components of a diffusion pipeline.

    Attributes:
        network: Denoiser, a UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel.
        scheduler: Scheduler of diffusers.
        kind: Kind of model: "ddpm", pixels, with classes if the network has them; "ldm", latents; "ldm_class", latents
            conditioned on classes through a table of embeddings; "sd", latents conditioned on encoder_hidden_states;
            "dit", latents conditioned on classes.
        sample_shape: Shape (C, H, W) of a state.
        components: Other components by their names in the pipeline: ``vae``, ``vqvae``, ``class_embedding``, and any
            further ones of a pipeline object.
        guidance: Default guidance scale of the pipeline; None without guidance.
        folder: Folder that the model was loaded from; None for a pipeline object.
    """

    network: nn.Module
    scheduler: Any
    kind: Kind
    sample_shape: tuple[int, int, int]
    components: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    folder: Path | None = None

    @property
    def decoder(self) -> Callable[[Tensor], Tensor] | None:
        """Decoder of latents (n, C, H, W) to images (n, 3, H', W') in about [-1, 1]; None if states are images."""
        network = next((self.components[name] for name in DECODERS if name in self.components), None)
        return None if network is None else Decoder(network, multiply=self.kind == "dit")

    @property
    def init_noise_sigma(self) -> float:
        """Factor of the standard normal noise before the first step."""
        return float(self.scheduler.init_noise_sigma)

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline class, of diffusers or of this package, that samples with these components."""
        scheduler = type(self.scheduler).__name__
        pixels = {"DDIMScheduler": "DDIMPipeline", "PNDMScheduler": "PNDMPipeline"}.get(scheduler, "DDPMPipeline")
        return _PIPELINES.get(self.kind, pixels)

    @property
    def classes(self) -> int | None:
        """Number of classes without the one for no class; None if the model takes no class labels."""
        if self.kind == "ldm_class":
            return len(self.components["class_embedding"].weight) - 1
        config: Any = self.network.config
        classes = config.get("num_embeds_ada_norm" if self.kind == "dit" else "num_class_embeds")
        return None if classes is None else int(classes)

    def denoiser(self, guidance: float | None = None) -> Denoiser:
        """Wrap the network in a :class:`Denoiser`, without guidance if it is None."""
        return Denoiser(self.network, guidance)

    def images(self, states: Tensor, batch: int | None = None) -> Tensor:
        """Convert last states (n, C, H, W) to images (n, C', H', W') in [0, 1], ``batch`` at a time."""
        return to_images(states, self.decoder, batch)

    def label_conditioning(self, labels: Tensor, guided: bool = True) -> Conditioning:
        """Return the denoiser's conditioning for class labels.

        Args:
            labels: Class labels (n,) int64.
            guided: Add the unconditional branch if the model has one.

        Raises:
            ConfigurationError: Model without classes, or a label out of range.
        """
        if self.classes is None:
            raise ConfigurationError(f"A {self.kind} model takes no class labels, found {len(labels)}: leave them out.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ConfigurationError(
                f"class labels {int(labels.min())} .. {int(labels.max())}: expected 0 .. {self.classes - 1}."
            )
        none = torch.full_like(labels, self.classes)
        if self.kind != "ldm_class":
            cond: Conditioning = {"class_labels": labels}
            return {**cond, "uncond_class_labels": none} if guided and self.kind == "dit" else cond
        embed = self.components["class_embedding"]
        with torch.no_grad():
            device = embed.weight.device
            cond = {"encoder_hidden_states": embed(labels.to(device)).to(labels.device)}
            if not guided:
                return cond
            return {**cond, "uncond_encoder_hidden_states": embed(none.to(device)).to(labels.device)}


def load_float_pipeline(
    source: Any,
    *,
    scheduler: Any = None,
    network: nn.Module | None = None,
    class_embedding: str | Path | Tensor | None = None,
    **download: Any,
) -> DiffusionModel:
    """Load a float diffusion model from a folder, the hub or a pipeline object.

    Args:
        source: Folder of a pipeline as ``save_pretrained`` writes it (DDPM, DDIM, PNDM, LDM, Stable Diffusion, DiT,
            and :class:`~lightning_quant.accuquant.class_conditional.ClassConditionalLDMPipeline`); folder of a
            denoiser alone; name on the hub; or a pipeline object, whose components are used directly.
        scheduler: Scheduler, an object or a folder, to use instead of the pipeline's; required for a denoiser alone.
        network: Network to use instead of the pipeline's denoiser.
        class_embedding: Table of a class-conditional LDM, (classes + 1, D), with the row for no class last; or a
            safetensors file with one such tensor.
        download: Further arguments of ``DiffusionPipeline.download`` for a name on the hub, such as ``revision`` or
            ``variant``.

    Raises:
        ConfigurationError: Missing folder, scheduler or denoiser.
        UnsupportedModelError: Pipeline, denoiser or scheduler that is not supported.
        CheckpointError: Files that are truncated or do not fit.

    Example:
        >>> from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
        >>> sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> network = UNet2DModel(**sizes, **blocks, add_attention=False)
        >>> model = load_float_pipeline(DDIMPipeline(network, DDIMScheduler()))
        >>> model.kind, model.sample_shape, model.pipeline_class
        ('ddpm', (3, 8, 8), 'DDIMPipeline')
    """
    if not isinstance(source, str | Path):
        return _of_object(source, scheduler, network, class_embedding)
    folder = read_folder(_local(source, download))
    name = folder.denoiser
    denoiser = network if network is not None else load_denoiser(folder)
    steps = as_the_pipeline_has_it(load_scheduler(folder, scheduler), folder.pipeline)
    components = {key: load_component(*folder.components[key]) for key in _others(folder)}
    return _model(denoiser, steps, components, class_embedding, folder.path, name)


def _local(source: str | Path, download: Mapping[str, Any]) -> Path:
    path = user_path(source)
    if path.is_dir():
        return path
    # A name on the hub is "owner/name"; anything else is meant to be a folder.
    parts = str(source).split("/")
    if isinstance(source, Path) or len(parts) > 2 or source.startswith((".", "~")) or not all(parts):
        raise ConfigurationError(
            f"There is no folder {path}: give the folder of a diffusers pipeline, with {INDEX}, or a name on the hub,"
            " as 'google/ddpm-cifar10-32'."
        )
    try:
        return user_path(import_module("diffusers").DiffusionPipeline.download(source, **download))
    except Exception as error:
        raise ConfigurationError(
            f"There is no folder {path}, and as a name on the hub {source!r} was not found or could not be"
            f" downloaded: {type(error).__name__}: {error}"
        ) from error


def _others(folder: PipelineFolder) -> list[str]:
    names = [name for name in (folder.decoder, "class_embedding") if name in folder.components]
    for name in names:
        path, kind = folder.components[name]  # type: ignore[index]
        if name in DECODERS and kind not in DECODER_CLASSES:
            raise UnsupportedModelError(
                f"The autoencoder in {path} is a {kind}; supported are {', '.join(DECODER_CLASSES)}."
            )
    return [name for name in names if name is not None]


def _of_object(
    pipeline: Any, scheduler: Any, network: nn.Module | None, class_embedding: str | Path | Tensor | None
) -> DiffusionModel:
    components = dict(getattr(pipeline, "components", {}))
    name = next((name for name in DENOISERS if components.get(name) is not None), None)
    if name is None:
        raise ConfigurationError(
            f"A {type(pipeline).__name__} has no {' or '.join(DENOISERS)}: give a folder, a name on the hub or a"
            " pipeline of diffusers."
        )
    denoiser = components.pop(name) if network is None else network
    steps = components.pop("scheduler", None) if scheduler is None else scheduler
    others = {key: value for key, value in components.items() if value is not None and key not in (name, "scheduler")}
    return _model(denoiser, steps, others, class_embedding, None, name)


def _model(
    network: nn.Module,
    scheduler: Any,
    components: dict[str, Any],
    class_embedding: str | Path | Tensor | None,
    folder: Path | None,
    name: str,
) -> DiffusionModel:
    if class_embedding is not None:
        components["class_embedding"] = _table(class_embedding, network)
    kind = _kind(network, components)
    config: Any = network.config
    size = config.sample_size
    if size is None:
        raise ConfigurationError(
            f"The {name}'s config has sample_size=None: write the height of a state into its config.json, as"
            ' "sample_size": 32.'
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = (int(config.in_channels), int(height), int(width))
    return DiffusionModel(network, scheduler, kind, shape, components, _GUIDANCE.get(kind), folder)


def _kind(network: nn.Module, components: Mapping[str, Any]) -> Kind:
    match check_denoiser(network):
        case "DiTTransformer2DModel":
            return "dit"
        case "UNet2DConditionModel":
            return "ldm_class" if "class_embedding" in components else "sd"
        case "UNet2DModel":
            return "ldm" if any(name in components for name in DECODERS) else "ddpm"
    raise UnsupportedModelError(
        f"The denoiser is a {type(network).__name__}; in a pipeline it has to be a UNet2DModel, UNet2DConditionModel or"
        " DiTTransformer2DModel. Use your own network and its scheduler in a LightningModule with the AccuQuant"
        " callback."
    )


def _table(source: str | Path | Tensor, network: nn.Module) -> Any:
    """Build the component of a table of classes; imported here because its module imports diffusers."""
    from lightning_quant.accuquant.class_conditional import class_embedding

    config: Any = network.config
    return class_embedding(source, config.get("cross_attention_dim"))
