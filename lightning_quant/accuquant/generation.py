"""Generation of images by number: their conditions, the images, and image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_quant.accuquant.conditions import class_labels, prompt_conditioning, read_prompts
from lightning_quant.accuquant.denoiser import Conditioning
from lightning_quant.accuquant.pipelines import DiffusionModel
from lightning_quant.accuquant.preparation import Parts
from lightning_quant.accuquant.samplers import Sampler
from lightning_quant.accuquant.text_encoding import read_embeddings, text_encoder
from lightning_quant.accuquant.trajectories import generate
from lightning_quant.data.noise import initial_noise
from lightning_quant.errors import ConfigurationError
from lightning_quant.utilities.paths import user_path

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class GeneratedImages(TypedDict):
    """Generated images (n, C, H, W) in [0, 1] and their numbers (n,)."""

    ids: Tensor
    images: Tensor


class Conditions:
    """Conditions of images by number: none, classes in turn, or prompts in turn.

    Args:
        model: Model that determines the kind of condition.
        guidance: Scale of classifier-free guidance, which needs the unconditional branch too; None without guidance.
        seed: Seed for drawing classes.
        classes: Number of classes, or the classes to use; None takes all classes of the model.
        prompts: File of prompts or of their embeddings, for text-to-image models only.

    Raises:
        ConfigurationError: Prompts or classes for a model that does not take them, or missing prompts.
    """

    def __init__(
        self,
        model: DiffusionModel,
        guidance: float | None = None,
        seed: int = 0,
        classes: int | Sequence[int] | None = None,
        prompts: str | None = None,
    ) -> None:
        self.model, self.guided, self.seed = model, guidance is not None, seed
        self.classes = model.classes if classes is None else classes
        self.prompts = prompts
        if model.kind == "sd" and prompts is None:
            raise ConfigurationError("A text-to-image model needs prompts: write prompts=FILE, one prompt per line.")
        if model.kind != "sd" and prompts is not None:
            raise ConfigurationError(f"prompts={prompts!r}: a {model.kind} model takes none, leave them out.")
        if model.classes is None and classes is not None:
            raise ConfigurationError(f"classes={classes!r}: a {model.kind} model takes none, leave them out.")
        if guidance is not None and model.guidance is None:
            raise ConfigurationError(
                f"guidance={guidance}: a {model.kind} model has no unconditional branch, leave it out."
            )
        self._encode: Any = None
        self._texts = read_prompts(prompts) if prompts is not None and not _is_table(prompts) else []

    def rows(self, ids: Iterable[int]) -> Conditioning:
        """Return the conditioning of some images, one row each."""
        numbers = list(ids)
        if self.prompts is not None and _is_table(self.prompts):
            return read_embeddings(self.prompts, numbers)
        if self._texts:
            if self._encode is None:
                self._encode = text_encoder(self.model)
            unconditional = "" if self.guided else None
            return prompt_conditioning(numbers, self._texts, self._encode, unconditional=unconditional)
        if self.classes is None:
            return {}
        return self.model.label_conditioning(class_labels(numbers, self.classes, self.seed), self.guided)

    def texts(self, ids: Iterable[int] | Tensor) -> list[str] | None:
        """Return the prompts of some images; None without a file of prompts."""
        return [self._texts[int(number) % len(self._texts)] for number in ids] if self._texts else None


def _is_table(prompts: str) -> bool:
    return prompts.endswith(".safetensors")


def generate_images(
    model: DiffusionModel, parts: Parts, sampler: Sampler, ids: Sequence[int], seed: int, device: torch.device
) -> Tensor:
    """Generate images (n, C, H, W) in [0, 1]; each depends on its number and the seed alone.

    Args:
        model: Model that decodes the last states.
        parts: Denoiser, quantized or not, and conditioning.
        sampler: Sampler that takes the steps.
        ids: Numbers of the images.
        seed: Seed of the noise.
        device: Device of the denoiser.
    """
    x = initial_noise(parts.shape, ids, seed) * model.init_noise_sigma
    trajectories = generate(parts.denoiser, sampler, x.to(device), parts.conditioning(ids), ids, seed)
    for component in model.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(device)
    return model.images(trajectories.states[-1]).clamp(0, 1)


def write_images(folder: str | Path, ids: Tensor, images: Tensor) -> None:
    """Write images as PNG files named by their numbers.

    Args:
        folder: Folder of the files; created if missing.
        ids: Numbers of the images, (n,).
        images: Images (n, C, H, W) in [0, 1].
    """
    from torchvision.utils import save_image

    target = user_path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for number, image in zip(ids.tolist(), images, strict=True):
        save_image(image, target / f"{number:06d}.png")


def read_images(folder: str | Path, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's batches of numbers (n,) and images (n, C, H, W) in [0, 1] from a folder of equal-sized images.

    Raises:
        ConfigurationError: Missing folder, or no images in it.
    """
    from torchvision.io import ImageReadMode, read_image

    files = sorted(path for path in user_path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise ConfigurationError(f"real_images={str(folder)!r}: no images ({', '.join(_SUFFIXES)}) in it.")
    numbers = list(range(len(files)))[rank::ranks]
    for first in range(0, len(numbers), batch):
        batch_ids = numbers[first : first + batch]
        images = torch.stack([read_image(str(files[n]), ImageReadMode.RGB) for n in batch_ids])
        yield torch.tensor(batch_ids), images.float() / 255
