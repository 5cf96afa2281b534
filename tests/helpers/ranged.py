"""Tiny denoisers of diffusers with quantizers in all slots, their leaves, and their float trajectories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from helpers.diffusion import Kind, tiny_denoiser, tiny_inputs, tiny_unet
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.plan import DenoiserPlan, plan_denoiser
from lightning_quant.accuquant.ranges import activation_quantizers, activation_ranges, prepare, weight_ranges
from lightning_quant.accuquant.samplers import Sampler
from lightning_quant.accuquant.settings import Settings
from lightning_quant.accuquant.trajectories import Trajectories, generate
from lightning_quant.data.noise import initial_noise
from lightning_quant.nn.structure import quantized_layers
from lightning_quant.quantizers import RoundedQuantizer

TIMESTEPS = (900, 500, 100)


def network_of(kind: Kind | Literal["flat"] = "ddpm") -> Any:
    """In float, its weights not to be trained; "flat" is a UNet of one level, with skips and one attention."""
    if kind == "flat":
        one: Any = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
        return tiny_unet(**one).requires_grad_(False)
    return tiny_denoiser(kind).requires_grad_(False)


def call(network: nn.Module, t: int | Tensor, n: int = 2) -> Tensor:
    """The denoiser's output on the same states each time."""
    x, conditioning = tiny_inputs(network, n)
    return Denoiser(network)(x, t, conditioning)


def plan_of(network: nn.Module, weight_bits: int = 4, activation_bits: int = 8, **settings: Any) -> DenoiserPlan:
    return plan_denoiser(network, Settings(weight_bits, activation_bits, **settings), partial(call, network, 1, 1))


def ranged(kind: Kind | Literal["flat"] = "ddpm", starts: Sequence[int] = (), **settings: Any) -> Any:
    """A denoiser with ranges from a few timesteps."""
    network = network_of(kind)
    prepare(network, plan_of(network, **settings), starts)
    activation_ranges(network, [partial(call, network, t) for t in TIMESTEPS])
    weight_ranges(network)
    return network


def learning(network: nn.Module) -> dict[str, Tensor]:
    """The leaf tensors of all quantizers, which learn from here on."""
    leaves: dict[str, Tensor] = {}
    for name, layer in quantized_layers(network):
        if isinstance(layer.weight_quantizer, RoundedQuantizer):
            begun = layer.weight_quantizer.begin(layer.weight)
            leaves.update({f"{name}.{leaf}": tensor for leaf, tensor in begun.items()})
    for (name, slot), quantizer in activation_quantizers(network).items():
        leaves.update({f"{name}.{slot}.{leaf}": tensor for leaf, tensor in quantizer.begin().items()})
    return leaves


def gradients(leaves: Iterable[Tensor]) -> Tensor:
    """All in one row, and forgotten."""
    found = []
    for leaf in leaves:
        found.append(torch.zeros_like(leaf).flatten() if leaf.grad is None else leaf.grad.flatten())
        leaf.grad = None
    return torch.cat(found)


def float_trajectories(network: nn.Module, sampler: Sampler, n: int = 2) -> Trajectories:
    x, conditioning = tiny_inputs(network, n)
    noise = initial_noise(x.shape[1:], range(n), 0)
    return generate(Denoiser(network), sampler, noise, conditioning, range(n), 0, keep=True)
