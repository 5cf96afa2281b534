"""Base class of quantized layers and opened attentions: the float class to restore, and loading of float weights."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_quant.quantizers import Quantizer

# Strict loading into a float module lists unexpected keys, so this key tells the user what to do.
HINT = "lightning_quant: this checkpoint is quantized; "


class _Load:
    """Findings of quantized modules during one call of ``load_state_dict``.

    Attributes:
        missing: List of missing keys, which PyTorch creates for each call and passes to all modules.
        quantized: Prefix of a module whose quantizers are in the state dict.
        floating: Prefix of a module that has only float weights in the state dict.
    """

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing
        self.quantized: str | None = None
        self.floating: str | None = None


_load = _Load([])


class QuantizedModule(nn.Module):
    """Mixin of a module class whose tensors are quantized by the quantizers in its slots.

    If a state dict has the module's weights but no state of its quantizers, these start over, no matter how the module
    is loaded or wrapped.

    Attributes:
        float_class: Class that :func:`~lightning_quant.nn.strip` restores.
        quantizer_slots: Names of the attributes that hold a quantizer or None.
    """

    float_class: ClassVar[type[nn.Module]]
    quantizer_slots: ClassVar[tuple[str, ...]]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        global _load
        if _load.missing is not missing_keys:
            _load = _Load(missing_keys)
        self._start_over(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if HINT not in key]

    def _start_over(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Add the state of uninitialized quantizers if the state dict has float weights only."""
        quantizers = {slot: q for slot in self.quantizer_slots if isinstance(q := getattr(self, slot), Quantizer)}
        loaded = [key for key in state_dict if key.startswith(prefix) and HINT not in key]
        if any(key.startswith(f"{prefix}{slot}.") for key in loaded for slot in quantizers):
            _load.quantized, first = prefix, _load.quantized is None
        elif quantizers and not all(key.endswith("bias") for key in loaded):
            _load.floating, first = prefix, _load.floating is None
            for slot, quantizer in quantizers.items():
                state = quantizer.unstarted_state()
                state_dict.update({f"{prefix}{slot}.{key}": value for key, value in state.items()})
        else:
            return
        if first:
            _report(_load)


def _report(load: _Load) -> None:
    """Report once how a state dict fits a quantized module."""
    if load.floating is not None and load.quantized is not None:
        quantized, floating = (prefix.rstrip(".") or "the module" for prefix in (load.quantized, load.floating))
        # Only the caller knows whether loading is strict. If so, it raises an error with the missing keys.
        load.missing.append(
            f"the quantizers of {floating}, which this module quantizes, while the state dict has those of {quantized}"
            " only: quantize the module as it was for the state dict, or write strict=False to estimate these ranges"
            " again"
        )
    elif load.floating is not None:
        rank_zero_info(
            "Float weights are loaded into a quantized module: its ranges will be set from the first training batch, or"
            " by calibration."
        )
