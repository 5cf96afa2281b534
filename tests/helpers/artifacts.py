"""Small quantized networks to save in tests."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_quant.nn import swap
from lightning_quant.quantizers import FixedQuantizer


def weights(layer: nn.Module, bits: int = 4, symmetric: bool = False) -> FixedQuantizer:
    quantizer = FixedQuantizer(bits, symmetric, axis=0)
    assert isinstance(layer.weight, Tensor)
    quantizer.initialize(layer.weight)
    return quantizer


def quantized(model: nn.Module, bits: int = 4) -> nn.Module:
    """Weights of all layers."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            swap(module, None, weights(module, bits, symmetric=isinstance(module, nn.Conv2d)))
    return model.eval()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 5, bias=False))
