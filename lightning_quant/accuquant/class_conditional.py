"""Pipeline for class-conditional latent diffusion (LDM-4 of Rombach et al., CVPR 2022), which diffusers lacks."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.utilities.paths import user_path


class ClassEmbedding(ModelMixin, ConfigMixin):  # type: ignore[misc, no-untyped-call]
    """Table of class embeddings for the denoiser's ``encoder_hidden_states``; the last row is for no class.

    Args:
        rows: Number of classes + 1.
        width: The denoiser's ``cross_attention_dim``.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(self, rows: int = 1001, width: int = 512) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, labels: Tensor) -> Tensor:
        """Return the embeddings (n, 1, width) of labels (n,) int64."""
        return self.weight[labels].unsqueeze(1)


def class_embedding(source: str | Path | Tensor, width: int) -> ClassEmbedding:
    """Build a class embedding from a table or from a file with one.

    Args:
        source: Table (classes + 1, width), with the row for no class last; or a safetensors file with one such tensor.
        width: The denoiser's ``cross_attention_dim``.

    Raises:
        CheckpointError: Missing or truncated file.
        ConfigurationError: Table of another shape, or a file with several tensors.

    Example:
        >>> class_embedding(torch.zeros(11, 4), 4)(torch.tensor([3, 10])).shape
        torch.Size([2, 1, 4])
    """
    table = source if isinstance(source, Tensor) else _only_tensor(user_path(source))
    if table.dim() != 2 or len(table) < 2 or table.shape[1] != width:
        raise ConfigurationError(
            f"class_embedding has shape {tuple(table.shape)}: expected (classes + 1, {width}), one row for each class"
            " and a last one for no class, as wide as the denoiser's cross_attention_dim."
        )
    embedding: ClassEmbedding = ClassEmbedding(*table.shape)
    embedding.weight.data = table.detach().float().clone()
    embedding.eval()
    return embedding


def _only_tensor(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"class_embedding={str(path)!r} is not a safetensors file ({error}).") from error
    if len(tensors) != 1:
        raise ConfigurationError(
            f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:4])}): expected one, (classes + 1, D)."
        )
    return next(iter(tensors.values()))


class ClassConditionalLDMPipeline(DiffusionPipeline):  # type: ignore[misc, no-untyped-call]
    """Pipeline that generates images of given classes in the latent space of a ``VQModel`` or ``AutoencoderKL``.

    ``save_pretrained`` writes this folder::

        model_index.json           "_class_name": "ClassConditionalLDMPipeline", and the class of each component
        unet/                      UNet2DConditionModel
        vqvae/                     VQModel or AutoencoderKL
        scheduler/
        class_embedding/           config.json with rows and width, and the tensor "weight" (classes + 1, width), last
                                   the row for no class, in diffusion_pytorch_model.safetensors

    ``class_embedding`` may be missing in the folder and passed as a file: in the original weights the table is
    ``cond_stage_model.embedding.weight``.
    """

    model_cpu_offload_seq: Any = "class_embedding->unet->vqvae"

    def __init__(self, vqvae: Any, unet: Any, scheduler: Any, class_embedding: Any) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler, class_embedding=class_embedding)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        eta: float = 0.0,
        generator: Any = None,
        num_inference_steps: int = 50,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Generate one image for each class label.

        Args:
            class_labels: Class indices of the n images.
            guidance_scale: Scale of classifier-free guidance, which is used above 1.
            eta: DDIM's eta: 0 is deterministic, 1 is as noisy as DDPM.
            generator: Random generator of the noise.
            num_inference_steps: Number of sampling steps.
            latents: Initial noise (n, C, H, W); None draws it.
            output_type: Type of the images: "pil", "np" or "pt"; arrays and tensors are in [0, 1].
        """
        labels = torch.tensor(class_labels, device=self._execution_device)
        none = torch.full_like(labels, len(self.class_embedding.weight) - 1)
        conditioning = {
            "encoder_hidden_states": self.class_embedding(labels),
            "uncond_encoder_hidden_states": self.class_embedding(none),
        }
        if latents is None:
            size, config = self.unet.config.sample_size, self.unet.config
            shape = (len(labels), config.in_channels, size, size)
            latents = randn_tensor(shape, generator=generator, device=labels.device, dtype=self.unet.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        denoiser = Denoiser(self.unet, guidance_scale if guidance_scale > 1 else None)
        self.scheduler.set_timesteps(num_inference_steps)
        extra = self._extra(eta, generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            latents = self.scheduler.step(denoiser(latents, t, conditioning), t, latents, **extra).prev_sample
        images = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def _extra(self, eta: float, generator: Any) -> dict[str, Any]:
        """Return the arguments that this scheduler's step accepts."""
        parameters = signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in parameters}
