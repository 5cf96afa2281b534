"""Swapping a module's layers for quantized ones, and describing that in a checkpoint so that it can be rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.functional.grid import FLOAT_BITS
from lightning_quant.gradient.interval import IntervalStrategy, LargeGradientInterval
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import Bits, swap
from lightning_quant.nn.layers import LAYERS, QUANTIZERS, Execution, QuantizedLayer
from lightning_quant.nn.strip import LOADING_HOOK, quantized_layers
from lightning_quant.quantizers import LearnedQuantizer, Quantizer
from lightning_quant.quantizers.base import bits_of_state

# Strict loading into a float module names the keys that it did not expect: this one says what to do.
HINT = (
    "lightning_quant: this checkpoint is quantized; add GradientQuantization to the Trainer's callbacks, or load it"
    " with lightning_quant.load_from_checkpoint(YourModule, path)"
)


def quantize_layers(
    module: nn.Module,
    chosen: Mapping[str, Bits],
    interval: IntervalStrategy,
    execution: Execution = "simulated",
    signed: Mapping[str, bool] | None = None,
) -> dict[str, QuantizedLayer]:
    """Swap the chosen layers in place.

    Args:
        module: any module.
        chosen: bit-widths by the layer's name in ``module``.
        interval: strategy of the gradient quantizers.
        execution: "integer" runs products on int8 codes where they fit.
        signed: whether the input of a layer has negative values, by its name; for others the first tensor decides.

    Returns:
        the quantized layers by name.
    """
    layers = {}
    for name, bits in chosen.items():
        layers[name] = swap(
            module.get_submodule(name),
            None if bits.activation == FLOAT_BITS else LearnedQuantizer(bits.activation, (signed or {}).get(name)),
            None if bits.weight == FLOAT_BITS else LearnedQuantizer(bits.weight, signed=True),
            None if bits.gradient == FLOAT_BITS else GradientQuantizer(bits.gradient, interval),
            execution,
        )
    guard_loading(module)
    return layers


def layer_bits(layer: QuantizedLayer) -> Bits:
    """Bit-widths of a quantized layer."""
    quantizers: dict[str, Quantizer | None] = {name: getattr(layer, name) for name in QUANTIZERS}
    return _bits({name: quantizer.bits for name, quantizer in quantizers.items() if quantizer is not None})


def rebuild(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Give a float module the quantized structure of a state dict; leaves a quantized module as it is.

    Raises:
        CheckpointError: quantized layers that the module does not have.
    """
    found: dict[str, dict[str, int]] = {}
    for key, value in state_dict.items():
        layer, _, rest = key.rpartition("._extra_state")[0].rpartition(".")
        if rest in QUANTIZERS:
            found.setdefault(layer, {})[rest] = bits_of_state(value)
    if not found or any(True for _ in quantized_layers(module)):
        return
    known = dict(module.named_modules(remove_duplicate=False))
    missing = [name for name in found if type(known.get(name)) not in LAYERS]
    if missing:
        raise CheckpointError(
            f"The checkpoint quantizes {missing[0]!r} and {len(missing) - 1} other layers that {type(module).__name__}"
            " does not have: build the module with the arguments it was trained with."
        )
    # A layer that the module holds under several names is in the state dict under each.
    once = {id(known[name]): (name, _bits(widths)) for name, widths in reversed(found.items())}
    quantize_layers(module, dict(once.values()), LargeGradientInterval())


def _bits(widths: Mapping[str, int]) -> Bits:
    return Bits(*(widths.get(f"{kind}_quantizer", FLOAT_BITS) for kind in ("weight", "input", "gradient")))


def guard_loading(module: nn.Module) -> None:
    """Let a quantized module load quantized and float state dicts, each strictly."""
    if LOADING_HOOK not in vars(module):
        handle = module.register_load_state_dict_pre_hook(_prepare_state)  # type: ignore[no-untyped-call]
        setattr(module, LOADING_HOOK, handle)


def _prepare_state(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state_dict.pop(prefix + HINT, None)
    own = {
        f"{prefix}{name}.{kind}.": getattr(layer, kind)
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, QuantizedLayer)
        for kind in QUANTIZERS
        if getattr(layer, kind) is not None
    }
    if not own or any(key.startswith(tuple(own)) for key in state_dict):
        return
    if not any(f".{kind}." in key for key in state_dict for kind in QUANTIZERS):
        rank_zero_info("A float checkpoint is loaded into a quantized module: its ranges start from the first batch.")
        for name, quantizer in own.items():
            state_dict.update({name + key: value for key, value in quantizer.unstarted_state().items()})


def mark(state_dict: dict[str, Tensor]) -> None:
    """Add the key that tells a float module what to do with this state dict."""
    state_dict[HINT] = torch.tensor(True)
