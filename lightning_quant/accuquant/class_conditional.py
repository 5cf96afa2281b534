"""A pipeline that diffusers lacks: the class-conditional latent diffusion of Rombach et al. (CVPR 2022), as LDM-4."""

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
    """One vector for each class, and a last one for none: what the denoiser gets as ``encoder_hidden_states``.

    Args:
        rows: classes + 1.
        width: the ``cross_attention_dim`` of the denoiser.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(self, rows: int = 1001, width: int = 512) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, labels: Tensor) -> Tensor:
        """(n, 1, width) of labels (n,) int64."""
        return self.weight[labels].unsqueeze(1)


def class_embedding(source: str | Path | Tensor, width: int) -> ClassEmbedding:
    """A table that is given, or the one in a file.

    Args:
        source: (classes + 1, width), last the row for no class; or a safetensors file with one such tensor.
        width: the ``cross_attention_dim`` of the denoiser.

    Raises:
        CheckpointError: no such file, or one that is cut off.
        ConfigurationError: another shape, or several tensors.

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
    found: ClassEmbedding = ClassEmbedding(*table.shape)
    found.weight.data = table.detach().float().clone()
    found.eval()
    return found


def _only_tensor(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"class_embedding={str(path)!r} is no safetensors file ({error}).") from error
    if len(tensors) != 1:
        raise ConfigurationError(
            f"{path} holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:4])}): expected one, (classes + 1, D)."
        )
    return next(iter(tensors.values()))


class ClassConditionalLDMPipeline(DiffusionPipeline):  # type: ignore[misc, no-untyped-call]
    """Images of classes, in the latent space of a ``VQModel`` or an ``AutoencoderKL``.

    Its folder, as ``save_pretrained`` writes it::

        model_index.json           "_class_name": "ClassConditionalLDMPipeline", and the class of each component
        unet/                      UNet2DConditionModel
        vqvae/                     VQModel or AutoencoderKL
        scheduler/
        class_embedding/           config.json with rows and width, and the tensor "weight" (classes + 1, width), last
                                   the row for no class, in diffusion_pytorch_model.safetensors

    ``class_embedding`` can be left out of the folder and be given as a file: the table of the original weights
    is ``cond_stage_model.embedding.weight``.
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
        """Generate an image of each class.

        Args:
            class_labels: n numbers of classes.
            guidance_scale: guidance is used where it is above 1.
            eta: of DDIM.
            generator: of the noise.
            num_inference_steps: steps of the scheduler.
            latents: (n, C, H, W), the noise to start from.
            output_type: "pil", "np" or "pt", the last in [0, 1].
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
        """Those of the arguments that this scheduler's step takes."""
        known = signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}
