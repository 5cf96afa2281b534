"""Swapping a module's layers for ones with quantized gradients."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from torch import nn

from lightning_quant.functional.grid import FLOAT_BITS
from lightning_quant.gradient.interval import IntervalStrategy
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import Bits, swap
from lightning_quant.nn.layers import QUANTIZERS, Execution, QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer, Quantizer


def quantize_layers(
    module: nn.Module,
    chosen: Mapping[str, Bits],
    interval: IntervalStrategy,
    execution: Execution = "simulated",
    signed: Mapping[str, bool] | None = None,
    originals: Mapping[str, str] | None = None,
) -> dict[str, QuantizedLayer]:
    """Swap the chosen layers in place.

    Args:
        module: any module.
        chosen: bit-widths by the layer's name in ``module``.
        interval: strategy of the gradient quantizers.
        execution: "integer" runs products on int8 codes where they fit.
        signed: whether the input of a layer has negative values, by its name; for others the first tensor decides.
        originals: Names of the layers that others copy, by the names of those: their ranges begin together.

    Returns:
        the quantized layers by name.
    """
    layers: dict[str, QuantizedLayer] = {}
    for name, bits in chosen.items():
        original = layers.get((originals or {}).get(name, ""))
        if original is not None:
            quantizers = {slot: deepcopy(getattr(original, slot)) for slot in QUANTIZERS}
            layers[name] = swap(module.get_submodule(name), **quantizers, execution=execution)
            continue
        layers[name] = swap(
            module.get_submodule(name),
            None if bits.activation == FLOAT_BITS else LearnedQuantizer(bits.activation, (signed or {}).get(name)),
            None if bits.weight == FLOAT_BITS else LearnedQuantizer(bits.weight, signed=True),
            None if bits.gradient == FLOAT_BITS else GradientQuantizer(bits.gradient, interval),
            execution,
        )
    return layers


def layer_bits(layer: QuantizedLayer) -> Bits:
    """Bit-widths of a quantized layer."""
    quantizers: dict[str, Quantizer | None] = {name: getattr(layer, name) for name in QUANTIZERS}
    widths = {name: quantizer.bits for name, quantizer in quantizers.items() if quantizer is not None}
    return Bits(*(widths.get(f"{kind}_quantizer", FLOAT_BITS) for kind in ("weight", "input", "gradient")))
