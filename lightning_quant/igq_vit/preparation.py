"""Preparation of a float network for calibration, with empty quantizer slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_quant.igq_vit.plan import VitPlan, plan_vit
from lightning_quant.igq_vit.settings import Settings
from lightning_quant.metrics.bops import measure_shapes
from lightning_quant.nn import strip, swap
from lightning_quant.nn.attention import restore_attention, swap_attention, swapped_attentions
from lightning_quant.nn.attention_check import check_attentions


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
