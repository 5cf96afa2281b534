"""From the last state of a sampler to an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoder:
    """Images of latents, with an autoencoder of diffusers.

    Args:
        network: AutoencoderKL or VQModel.
        multiply: whether latents are multiplied by 1 / scaling_factor, as DiTPipeline does, and not divided by the
            factor, as the others do: the images of the pipelines are to be had bit for bit.
    """

    network: Any
    multiply: bool = False

    def __call__(self, latents: Tensor) -> Tensor:
        """(n, 3, H', W') in about [-1, 1], of (n, C, H, W), on the device of the latents.

        Gradients flow, except through the nearest vector of a ``VQModel``.
        """
        factor = self.network.config.scaling_factor
        own = next(self.network.parameters())
        x = latents.to(own.device, own.dtype)
        images: Tensor = self.network.decode(1 / factor * x if self.multiply else x / factor).sample
        return images.to(latents.device, latents.dtype)


@torch.no_grad()
def to_images(states: Tensor, decoder: Any = None, batch: int | None = None) -> Tensor:
    """Images in [0, 1].

    Args:
        states: (n, C, H, W), the last of a sampler.
        decoder: of latents; None where the states are images in [-1, 1].
        batch: images decoded at once, None for all.

    Returns:
        (n, C', H', W').

    Example:
        >>> to_images(torch.tensor([[[[-1.0, 0.0, 3.0]]]]))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    if decoder is not None:
        states = torch.cat([decoder(rows) for rows in states.split(batch or max(len(states), 1))])
    return (states / 2 + 0.5).clamp(0, 1)
