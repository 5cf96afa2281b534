"""Whether a network that is calibrated already was calibrated as a callback says."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_quant.errors import QuantizationError
from lightning_quant.igq_vit.schemes import PATCH_BITS
from lightning_quant.igq_vit.settings import Scheme, Settings
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.dynamic import ChannelQuantizer, LogQuantizer, TokenQuantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer

# By which quantizers a scheme is told, the first that is found: the upper bound has rows of their own too.
_TELLS: dict[type[Quantizer], Scheme] = {
    GroupQuantizer: "igq",
    RowGroupQuantizer: "igq",
    ChannelQuantizer: "upper_bound",
    TokenQuantizer: "per_token",
    LogQuantizer: "repq",
}


def check_agrees(module: nn.Module, settings: Settings) -> None:
    """Compare what the quantizers of a calibrated module tell with settings; how ranges were found they do not tell.

    Raises:
        QuantizationError: another scheme, other bits, or other groups where these are the same everywhere.
    """
    for name, found, expected in _compared(module, settings):
        if found != expected:
            raise QuantizationError(
                f"The module is already quantized, with {name}={found!r}, and the callback says {name}={expected!r}:"
                " call lightning_quant.strip(module) first, which lets it calibrate anew, or give the callback the"
                " arguments it was calibrated with."
            )


def _compared(module: nn.Module, settings: Settings) -> Iterator[tuple[str, object, object]]:
    """Name, value of the module and value of the settings."""
    slots = [(name.rpartition(".")[2], quantizer) for name, quantizer in quantizers_of(module)]
    kinds = {type(quantizer) for _, quantizer in slots}
    yield "scheme", next((scheme for kind, scheme in _TELLS.items() if kind in kinds), "layer_wise"), settings.scheme
    weights = {quantizer.bits for slot, quantizer in slots if slot == "weight_quantizer"}
    yield "weight_bits", _one(weights, settings.weight_bits), settings.weight_bits
    # Of the patch embedding, whatever the others have.
    others = {quantizer.bits for slot, quantizer in slots if slot != "weight_quantizer"}
    others = others - {PATCH_BITS} or others
    yield "activation_bits", _one(others, settings.activation_bits), settings.activation_bits
    if not settings.allocates:
        channels = {quantizer.groups for _, quantizer in slots if isinstance(quantizer, GroupQuantizer)}
        yield "groups", _one(channels, settings.groups), settings.groups
        rows = {quantizer.groups for _, quantizer in slots if isinstance(quantizer, RowGroupQuantizer)}
        yield "softmax_groups", _one(rows, settings.row_groups), settings.row_groups


def _one(found: set[int], expected: int) -> int | list[int]:
    """The value where there is one, the expected where there is none."""
    return found.pop() if len(found) == 1 else sorted(found) or expected
