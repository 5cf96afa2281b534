"""Messages of an INT4 training about its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_quant.nn.layers import Execution, QuantizedLayer


def execution_note(execution: Execution) -> str:
    """Say how products are computed, in words that follow "products are".

    Example:
        >>> execution_note("simulated")
        'simulated in floating point (same numbers as integer units, no faster)'
    """
    if execution == "simulated":
        return "simulated in floating point (same numbers as integer units, no faster)"
    return "run on int8 codes with int32 sums (Linear, and Conv without groups by unfold), others are simulated"


def integer_paths(layers: Mapping[str, QuantizedLayer]) -> str:
    """Say which layers run on int8 codes, after their first batch.

    Args:
        layers: Quantized layers by name.
    """
    simulated = [name for name, layer in layers.items() if not layer.runs_integer()]
    text = f"{len(layers) - len(simulated)} of {len(layers)} layers run on int8 codes with int32 sums"
    return f"{text}; simulated in floating point: {', '.join(simulated)}." if simulated else f"{text}."


def thawed_layers(frozen: Mapping[str, nn.Module]) -> str:
    """Warn of layers that were frozen when the others were quantized, and train now; empty where none does.

    Args:
        frozen: Layers by name that were frozen.
    """
    thawed = [name for name, layer in frozen.items() if layer.weight.requires_grad]
    if not thawed:
        return ""
    return (
        f"{len(thawed)} layers were frozen when the module was quantized and train now, in float: {few(thawed)}."
        " Name them in include= to quantize them from the start, or in exclude= if that is meant."
    )


def unstarted_layers(layers: Mapping[str, QuantizedLayer]) -> str:
    """Warn of layers that have no range after an epoch; empty where all have one.

    Args:
        layers: Quantized layers by name.
    """
    names = [name for name, layer in layers.items() if not _started(layer)]
    if not names:
        return ""
    return (
        f"{len(names)} layers are still in float after an epoch, since their forward was not called with gradients or"
        f" saw only zeros: {', '.join(names)}. Leave them out with exclude= if that is meant."
    )


def few(names: Collection[str]) -> str:
    """List at most four names.

    Example:
        >>> few({"b", "a"}), few("edcba")
        ('a, b', 'a, b, c, d ...')
    """
    return ", ".join(sorted(names)[:4]) + (" ..." if len(names) > 4 else "")


def _started(layer: QuantizedLayer) -> bool:
    quantizers = [q for q in (layer.input_quantizer, layer.weight_quantizer) if q is not None]
    for quantizer in quantizers:
        if not quantizer.ready:  # An average gets its range from outside.
            quantizer.refresh_ready()
    return all(quantizer.ready for quantizer in quantizers)
