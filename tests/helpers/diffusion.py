"""Tiny random denoisers of diffusers, and pipeline directories of each kind with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["ddpm", "ddim", "ldm", "ldm_class", "sd", "dit"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CLASSES, TOKENS, WIDTH = 10, 5, 16
_BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_UNET: dict[str, Any] = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "attention_head_dim": 8, **_BLOCKS}


def tiny_unet(seed: int = 0, **overrides: Any) -> Any:
    """A ``UNet2DModel`` on 3 x 8 x 8 images with attention at 4 x 4 and two skip connections a level."""
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return _seeded(UNet2DModel, seed, **{**_UNET, **blocks, **overrides})


def tiny_condition_unet(seed: int = 0, **overrides: Any) -> Any:
    """A ``UNet2DConditionModel`` on 4 x 8 x 8 latents and ``encoder_hidden_states`` (n, L, 16)."""
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH}
    return _seeded(UNet2DConditionModel, seed, **{**_UNET, **blocks, **sizes, **overrides})


def tiny_dit(seed: int = 0, **overrides: Any) -> Any:
    """A ``DiTTransformer2DModel`` on 4 x 8 x 8 latents with 1000 classes and learned sigma, as DiT-XL-2-256."""
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 8}
    return _seeded(
        DiTTransformer2DModel, seed, **{**sizes, "in_channels": 4, "out_channels": 8, "sample_size": 8, **overrides}
    )


def tiny_autoencoder(seed: int = 0, **overrides: Any) -> Any:
    """An ``AutoencoderKL`` from 4 x 8 x 8 latents to 3 x 16 x 16 images."""
    from diffusers import AutoencoderKL

    return _seeded(AutoencoderKL, seed, **{**_autoencoder(4), "scaling_factor": 0.5, **overrides})


def tiny_vqmodel(seed: int = 0, channels: int = 3, **overrides: Any) -> Any:
    """A ``VQModel`` from latents of 8 x 8 to 3 x 16 x 16 images."""
    from diffusers import VQModel

    return _seeded(VQModel, seed, **{**_autoencoder(channels), "num_vq_embeddings": 32, **overrides})


def _autoencoder(channels: int) -> dict[str, Any]:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {**_BLOCKS, **kinds, "latent_channels": channels, "sample_size": 16}


def _seeded(kind: Any, seed: int, **arguments: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**arguments).eval()


def tiny_denoiser(kind: Kind, seed: int = 0) -> Any:
    """The denoiser of a kind of pipeline."""
    match kind:
        case "ldm_class" | "sd":
            return tiny_condition_unet(seed)
        case "dit":
            return tiny_dit(seed)
    return tiny_unet(seed)


def tiny_inputs(network: nn.Module, n: int = 2, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """A state (n, C, H, W) for a tiny denoiser and its conditioning, both branches of it."""
    config: Any = network.config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    if "DiT" in type(network).__name__:
        return x, {"class_labels": torch.arange(n), "uncond_class_labels": torch.full((n,), 1000)}
    if "Condition" in type(network).__name__:
        hidden, empty = torch.randn(2, n, TOKENS, WIDTH, generator=generator)
        return x, {"encoder_hidden_states": hidden, "uncond_encoder_hidden_states": empty}
    return x, {}


def tiny_pipeline_folder(kind: Kind, path: str | Path, seed: int = 0, scheduler: Any = None) -> Path:
    """A pipeline directory as diffusers writes it; Stable Diffusion without text encoder and tokenizer.

    Args:
        kind: of the pipeline.
        path: where to; made.
        seed: of all weights.
        scheduler: in place of the kind's own.
    """
    import diffusers

    folder = Path(path)
    prediction = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
    components: dict[str, Any] = {"transformer" if kind == "dit" else "unet": tiny_denoiser(kind, seed)}
    match kind:
        case "ddpm":
            name, components["scheduler"] = "DDPMPipeline", diffusers.DDPMScheduler()
        case "ddim":
            name, components["scheduler"] = "DDIMPipeline", diffusers.DDIMScheduler()
        case "ldm":
            name, components["scheduler"] = "LDMPipeline", diffusers.DDIMScheduler(**prediction)
            components["vqvae"] = tiny_vqmodel(seed)
        case "ldm_class":
            from lightning_quant.accuquant.class_conditional import ClassEmbedding

            name, components["scheduler"] = "ClassConditionalLDMPipeline", diffusers.DDIMScheduler(**prediction)
            components["vqvae"] = tiny_vqmodel(seed, channels=4)
            components["class_embedding"] = _seeded(ClassEmbedding, seed, rows=CLASSES + 1, width=WIDTH)
        case "sd":
            pndm = diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
            name, components["scheduler"] = "StableDiffusionPipeline", pndm
            components["vae"] = tiny_autoencoder(seed)
        case "dit":
            name, components["scheduler"] = "DiTPipeline", diffusers.DDIMScheduler(clip_sample=False)
            components["vae"] = tiny_autoencoder(seed)
    components["scheduler"] = scheduler or components["scheduler"]
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    for component, value in components.items():
        value.save_pretrained(folder / component)
        library = type(value).__module__
        index[component] = ["diffusers" if library.startswith("diffusers.") else library, type(value).__name__]
    if kind == "sd":
        absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        index.update({component: [None, None] for component in absent})
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder
