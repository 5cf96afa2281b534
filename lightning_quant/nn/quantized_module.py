"""What quantized layers and opened attentions share: a float class to go back to, and how they load float weights."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_quant.quantizers import Quantizer

# Strict loading into a float module names the keys that it did not expect: this one says what to do.
HINT = "lightning_quant: this checkpoint is quantized; "


class _Load:
    """What quantized modules have met in one call of ``load_state_dict``.

    Attributes:
        missing: The list of missing keys, which PyTorch makes for each call and hands to all modules.
        quantized: Prefix of a module whose quantizers were in the state dict.
        floating: Prefix of a module of which only float weights were.
    """

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing
        self.quantized: str | None = None
        self.floating: str | None = None


_load = _Load([])


class QuantizedModule(nn.Module):
    """Mixin of a module's class whose tensors go through the quantizers in its slots.

    Where a state dict has the module's weights and nothing of its quantizers, these start anew, whatever the module
    is loaded with or wrapped in.

    Attributes:
        float_class: Class to which the module goes back.
        quantizer_slots: Names under which it has quantizers, or None.
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
        self._start_anew(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if HINT not in key]

    def _start_anew(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Add the state of quantizers that saw nothing yet, where the state dict has float weights only."""
        quantizers = {slot: q for slot in self.quantizer_slots if isinstance(q := getattr(self, slot), Quantizer)}
        loaded = [key for key in state_dict if key.startswith(prefix) and HINT not in key]
        if any(key.startswith(f"{prefix}{slot}.") for key in loaded for slot in quantizers):
            _load.quantized, news = prefix, _load.quantized is None
        elif quantizers and not all(key.endswith("bias") for key in loaded):
            _load.floating, news = prefix, _load.floating is None
            for slot, quantizer in quantizers.items():
                state = quantizer.unstarted_state()
                state_dict.update({f"{prefix}{slot}.{key}": value for key, value in state.items()})
        else:
            return
        if news:
            _report(_load)


def _report(load: _Load) -> None:
    """Say once what a state dict is to a quantized module."""
    if load.floating is not None and load.quantized is not None:
        quantized, floating = (prefix.rstrip(".") or "the module" for prefix in (load.quantized, load.floating))
        # Only the caller knows whether it is strict: it then raises what is missing.
        load.missing.append(
            f"the quantizers of {floating}, which this module quantizes and the state dict, with those of {quantized},"
            " does not: quantize the module as the state dict's was, or write strict=False to find these ranges anew"
        )
    elif load.floating is not None:
        rank_zero_info(
            "Float weights are loaded into a quantized module: its ranges start from the first batch of training, or"
            " are to be calibrated."
        )
