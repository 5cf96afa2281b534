"""Diffusion models as AccuQuant works on them, from pipelines of diffusers."""

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
# Those of the pipelines of diffusers; of the class-conditional LDM that of its paper.
_GUIDANCE: dict[Kind, float] = {"ldm_class": 3.0, "sd": 7.5, "dit": 4.0}
_PIPELINES: dict[Kind, str] = {
    "ldm": "LDMPipeline",
    "ldm_class": OWN_PIPELINE,
    "sd": "StableDiffusionPipeline",
    "dit": "DiTPipeline",
}


@dataclass(frozen=True)
class DiffusionModel:
    """A denoiser, its scheduler and what is around them.

    Attributes:
        network: the denoiser; a UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel.
        scheduler: of diffusers.
        kind: "ddpm", pixels, with classes where the network has them; "ldm", latents; "ldm_class", latents of classes
            by a table of embeddings; "sd", latents of encoder_hidden_states; "dit", latents of classes.
        sample_shape: (C, H, W) of a state.
        components: the other networks by their names in the pipeline, ``vae``, ``vqvae``, ``class_embedding``, and
            whatever else came with a pipeline object.
        guidance: what the pipeline's own default is; None without guidance.
        folder: where it was loaded from.
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
        """From latents (n, C, H, W) to images (n, 3, H', W') in about [-1, 1]; None where states are images."""
        network = next((self.components[name] for name in DECODERS if name in self.components), None)
        return None if network is None else Decoder(network, multiply=self.kind == "dit")

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied with before the first step."""
        return float(self.scheduler.init_noise_sigma)

    @property
    def pipeline_class(self) -> str:
        """Name of the class of diffusers, or of ours, that samples with these components."""
        scheduler = type(self.scheduler).__name__
        pixels = {"DDIMScheduler": "DDIMPipeline", "PNDMScheduler": "PNDMPipeline"}.get(scheduler, "DDPMPipeline")
        return _PIPELINES.get(self.kind, pixels)

    @property
    def classes(self) -> int | None:
        """How many classes it knows, the one for none left out; None where it takes no class labels."""
        if self.kind == "ldm_class":
            return len(self.components["class_embedding"].weight) - 1
        config: Any = self.network.config
        known = config.get("num_embeds_ada_norm" if self.kind == "dit" else "num_class_embeds")
        return None if known is None else int(known)

    def denoiser(self, guidance: float | None = None) -> Denoiser:
        """A :class:`Denoiser` around the network, without guidance where it is None."""
        return Denoiser(self.network, guidance)

    def images(self, states: Tensor, batch: int | None = None) -> Tensor:
        """Images (n, 3 or so, H', W') in [0, 1] of the last states (n, C, H, W), decoded some at a time."""
        return to_images(states, self.decoder, batch)

    def label_conditioning(self, labels: Tensor, guided: bool = True) -> Conditioning:
        """What the denoiser is given for classes.

        Args:
            labels: (n,) int64.
            guided: with the unconditional branch, where the model has one.

        Raises:
            ConfigurationError: a model without classes, or a label that it does not know.
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
            here = embed.weight.device
            cond = {"encoder_hidden_states": embed(labels.to(here)).to(labels.device)}
            return {**cond, "uncond_encoder_hidden_states": embed(none.to(here)).to(labels.device)} if guided else cond


def load_float_pipeline(
    source: Any,
    *,
    scheduler: Any = None,
    network: nn.Module | None = None,
    class_embedding: str | Path | Tensor | None = None,
    **download: Any,
) -> DiffusionModel:
    """A diffusion model by its folder, its name on the hub, or from a pipeline of diffusers.

    Args:
        source: the folder of a pipeline as ``save_pretrained`` writes it (DDPM, DDIM, PNDM, LDM, Stable Diffusion, DiT,
            and :class:`~lightning_quant.accuquant.class_conditional.ClassConditionalLDMPipeline`); the folder of a
            denoiser alone; a name on the hub; or a pipeline object, whose components are taken as they are.
        scheduler: in place of the pipeline's, an object or a folder; needed for a denoiser alone.
        network: in place of the pipeline's denoiser.
        class_embedding: of a class-conditional LDM, (classes + 1, D), last the row for no class; a safetensors file
            with one tensor.
        download: what else ``DiffusionPipeline.download`` takes for a name on the hub, as ``revision`` or ``variant``.

    Raises:
        ConfigurationError: no such folder, no scheduler, no denoiser.
        UnsupportedModelError: a pipeline, denoiser or scheduler that is not supported.
        CheckpointError: files that are cut off or do not fit.

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
    found = network if network is not None else load_denoiser(folder)
    own = load_scheduler(folder, scheduler)
    components = {key: load_component(*folder.components[key]) for key in _others(folder)}
    return _model(found, as_the_pipeline_has_it(own, folder.pipeline), components, class_embedding, folder.path, name)


def _local(source: str | Path, download: Mapping[str, Any]) -> Path:
    path = user_path(source)
    if path.is_dir():
        return path
    # A name on the hub is "owner/name"; anything else was meant to be a folder.
    parts = str(source).split("/")
    if isinstance(source, Path) or len(parts) > 2 or source.startswith((".", "~")) or not all(parts):
        raise ConfigurationError(
            f"There is no folder {path}: give that of a diffusers pipeline, with {INDEX}, or a name on the hub, as"
            " 'google/ddpm-cifar10-32'."
        )
    try:
        return user_path(import_module("diffusers").DiffusionPipeline.download(source, **download))
    except Exception as error:
        raise ConfigurationError(
            f"There is no folder {path}, and as a name on the hub {source!r} was not found or could not be"
            f" downloaded: {type(error).__name__}: {error}"
        ) from error


def _others(folder: PipelineFolder) -> list[str]:
    found = [name for name in (folder.decoder, "class_embedding") if name in folder.components]
    for name in found:
        path, kind = folder.components[name]  # type: ignore[index]
        if name in DECODERS and kind not in DECODER_CLASSES:
            raise UnsupportedModelError(
                f"The autoencoder in {path} is a {kind}; supported are {', '.join(DECODER_CLASSES)}."
            )
    return [name for name in found if name is not None]


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
    own = components.pop(name) if network is None else network
    steps = components.pop("scheduler", None) if scheduler is None else scheduler
    others = {key: value for key, value in components.items() if value is not None and key not in (name, "scheduler")}
    return _model(own, steps, others, class_embedding, None, name)


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
        f"The denoiser is a {type(network).__name__}; of a pipeline it has to be a UNet2DModel, UNet2DConditionModel or"
        " DiTTransformer2DModel. Give AccuQuant a network of your own and its scheduler without a pipeline."
    )


def _table(source: str | Path | Tensor, network: nn.Module) -> Any:
    """A table of classes as a component; here, as its module imports diffusers."""
    from lightning_quant.accuquant.class_conditional import class_embedding

    config: Any = network.config
    return class_embedding(source, config.get("cross_attention_dim"))
