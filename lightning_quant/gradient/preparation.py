"""The preparation of a module for INT4 training: checks, and layers exchanged for quantized ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, WeightAveraging
from torch import nn

from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.functional.grid import FLOAT_BITS
from lightning_quant.gradient.interval import IntervalStrategy
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.gradient.summary import few
from lightning_quant.nn import Bits, Plan, swap
from lightning_quant.nn.layers import LAYERS, QUANTIZERS, Execution, QuantizedLayer
from lightning_quant.nn.selection import check_patterns, matches
from lightning_quant.quantizers import LearnedQuantizer, Quantizer


def quantize_layers(
    module: nn.Module,
    chosen: Mapping[str, Bits],
    interval: IntervalStrategy,
    execution: Execution = "simulated",
    signed: Mapping[str, bool] | None = None,
    originals: Mapping[str, str] | None = None,
) -> dict[str, QuantizedLayer]:
    """Exchange the chosen layers in place.

    Args:
        module: Module whose layers are exchanged in place.
        chosen: Bit-widths by the layer's name in ``module``.
        interval: Strategy of the gradient quantizers.
        execution: Execution of the products: "integer" runs them on int8 codes where these fit.
        signed: Signs of the inputs by the layer's name: whether they have negative values. The first tensor decides
            for the others.
        originals: Names of the layers that others copy, by the names of those: their ranges begin together.

    Returns:
        Quantized layers by name.
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
    """Return the bit-widths of a quantized layer."""
    quantizers: dict[str, Quantizer | None] = {name: getattr(layer, name) for name in QUANTIZERS}
    widths = {name: quantizer.bits for name, quantizer in quantizers.items() if quantizer is not None}
    return Bits(*(widths.get(f"{kind}_quantizer", FLOAT_BITS) for kind in ("weight", "input", "gradient")))


def signs_of(signed: Mapping[str, bool], names: Sequence[str]) -> dict[str, bool]:
    """Return the signs of the inputs of the layers that patterns name.

    Args:
        signed: Signs by fnmatch pattern.
        names: Names of the quantized layers.

    Raises:
        ConfigurationError: A pattern that matches none of the names.

    Example:
        >>> signs_of({"layer1": False}, ["layer1.conv", "layer2.conv"])
        {'layer1.conv': False}
    """
    check_patterns(list(signed), "signed", list(names))
    return {name: sign for name in names for pattern, sign in signed.items() if matches(name, [pattern])}


def layers_of(module: nn.Module) -> set[nn.Module]:
    """Return all layers of a module that can be quantized, or are."""
    return {child for child in module.modules() if isinstance(child, tuple(LAYERS))}


def check_still_there(module: nn.Module, layers: dict[str, QuantizedLayer]) -> None:
    """Refuse to train a module that no longer holds the layers that were exchanged.

    Raises:
        QuantizationError: A layer that is gone.
    """
    present = {id(child) for child in module.modules()}
    gone = [name for name, layer in layers.items() if id(layer) not in present]
    if gone:
        raise QuantizationError(
            f"{len(gone)} quantized layers are no longer in {type(module).__name__}, which would train in float:"
            f" {', '.join(gone[:4])}. setup or configure_model builds the network anew each time it is called: build it"
            " only where it is missing, for example `if self.net is None: self.net = ...`."
        )


def check_order(trainer: pl.Trainer, callback: pl.Callback, plan: Plan) -> None:
    """Refuse callbacks before this one that copy the float module, or train later what is frozen now.

    Raises:
        ConfigurationError: Such a callback, with the order to write.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(callback)] if callback in callbacks else []
    if any(isinstance(other, WeightAveraging) for other in before):
        raise ConfigurationError(
            "A WeightAveraging callback stands before GradientQuantization and would average the float module: write"
            " callbacks=[GradientQuantization(...), ..., WeightAveraging(...)]."
        )
    if plan.frozen and any(isinstance(other, BaseFinetuning) for other in before):
        raise ConfigurationError(
            f"A BaseFinetuning callback stands before GradientQuantization, and {few(plan.frozen)} are frozen, which"
            " it may train later: write callbacks=[GradientQuantization(...), ..., BackboneFinetuning(...)]."
        )
