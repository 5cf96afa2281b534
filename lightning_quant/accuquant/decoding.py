"""Decoding of a sampler's last states to images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoder:
    """Decoder of latents with an autoencoder of diffusers.

    Args:
        network: Autoencoder, an AutoencoderKL or VQModel.
        multiply: Multiply latents by 1 / scaling_factor, as DiTPipeline does, instead of dividing by the factor, as
            other pipelines do: images equal those of the pipeline bit for bit.
    """

    network: Any
    multiply: bool = False

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents (n, C, H, W) to images (n, 3, H', W') in about [-1, 1], on the device of the latents.

        The decoding is differentiable, except for the nearest-vector lookup of a ``VQModel``.
        """
        factor = self.network.config.scaling_factor
        parameter = next(self.network.parameters())
        x = latents.to(parameter.device, parameter.dtype)
        images: Tensor = self.network.decode(1 / factor * x if self.multiply else x / factor).sample
        return images.to(latents.device, latents.dtype)


@torch.no_grad()
def to_images(states: Tensor, decoder: Any = None, batch: int | None = None) -> Tensor:
    """Convert a sampler's last states to images in [0, 1].

    Args:
        states: Last states of a sampler, (n, C, H, W).
        decoder: Decoder of latents; None if the states are images in [-1, 1].
        batch: Number of images decoded at once; None decodes all together.

    Returns:
        Images (n, C', H', W').

    Example:
        >>> to_images(torch.tensor([[[[-1.0, 0.0, 3.0]]]]))
        tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """
    if decoder is not None:
        states = torch.cat([decoder(rows) for rows in states.split(batch or max(len(states), 1))])
    return (states / 2 + 0.5).clamp(0, 1)
