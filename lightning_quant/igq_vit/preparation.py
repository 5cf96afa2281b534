"""Preparation of a calibration: layers swapped with empty quantizer slots, plan and estimate."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_quant.igq_vit.calibration import Calibration, Source
from lightning_quant.igq_vit.plan import VitPlan, plan_vit
from lightning_quant.igq_vit.settings import Settings
from lightning_quant.igq_vit.summary import estimate
from lightning_quant.metrics.bops import measure_shapes
from lightning_quant.nn import strip, swap
from lightning_quant.nn.agreement import check_weights_agree
from lightning_quant.nn.attention import restore_attention, swap_attention, swapped_attentions
from lightning_quant.nn.attention_check import check_attentions
from lightning_quant.utilities.distributed import gather
from lightning_quant.utilities.hashing import fingerprint

# A single image takes longer than its share of a batch.
TIMED_IMAGES = 8


def start(
    network: nn.Module,
    settings: Settings,
    images: Tensor,
    run: Callable[[Tensor], Any],
    posteriors: Callable[[Any], Tensor],
) -> Calibration:
    """Prepare a network, print plan and estimate, and return its calibration.

    Args:
        network: Network in float, the same on all ranks.
        settings: Settings of the calibration.
        images: Calibration images of this rank, (n, C, H, W), on any device.
        run: Forward of the network in the precision of the Trainer.
        posteriors: Function from outputs to log-probabilities (items, classes).

    Raises:
        QuantizationError: Weights that differ between ranks, or are divided among them.
        UnsupportedModelError: See :func:`prepare`.
        ConfigurationError: See :func:`prepare`.
    """
    check_weights_agree(network)
    device = next(network.parameters()).device
    digest = images_hash(images, device)
    images = images.to(device)
    training = network.training
    network.eval()
    with torch.no_grad():
        plan = prepare(network, settings, images[:1], run)
        timed = images[:TIMED_IMAGES]
        begin = time.perf_counter()
        run(timed)
        seconds = (time.perf_counter() - begin) / len(timed)
    # Also sets the mode of the new layers.
    network.train(training)
    rank_zero_info(f"{plan}\n{estimate(plan, seconds, len(images))}")
    return Calibration(Source(network, plan, run, images, posteriors, digest))


def prepare(network: nn.Module, settings: Settings, image: Tensor, run: Callable[[Tensor], object]) -> VitPlan:
    """Swap the attentions and layers of a network, with all quantizer slots empty, so that it still runs in float.

    Args:
        network: Network in float. A quantized one is put back to float first.
        settings: Settings of the calibration.
        image: Image (1, C, H, W) to measure shapes with.
        run: Forward of the network.

    Raises:
        UnsupportedModelError: See :func:`plan_vit` and ``check_attentions``. The network is then back in float.
        ConfigurationError: See :func:`plan_vit`. The network is then back in float.
    """
    strip(network)
    try:
        for name in check_attentions(network, settings.exclude):
            swap_attention(network.get_submodule(name), parent=network.get_submodule(name.rpartition(".")[0]))
        one, two = (measure_shapes(network, torch.cat([image] * n), run=run) for n in (1, 2))
        plan = plan_vit(network, one, settings, {shape.name for shape in set(one) ^ set(two)})
    except Exception:
        strip(network)
        raise
    for name in plan.names("grouped", "one token", "patch"):
        swap(network.get_submodule(name))
    for name, _ in list(swapped_attentions(network)):
        if name not in plan.names("attention"):
            restore_attention(network.get_submodule(name))
    return plan


def images_hash(images: Tensor, device: torch.device) -> str:
    """Hash the calibration images of all ranks with SHA-256, independent of how ranks share them.

    Args:
        images: Images of this rank.
        device: Device on which ranks exchange tensors.
    """
    digests = torch.tensor([list(bytes.fromhex(fingerprint(image))) for image in images], device=device)
    return hashlib.sha256(repr(sorted(gather(digests).tolist())).encode()).hexdigest()
