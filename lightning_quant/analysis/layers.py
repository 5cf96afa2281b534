"""Figures of each quantized layer and opened attention, and what the network loses by each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from lightning_quant.errors import QuantizationError
from lightning_quant.metrics.tensor_error import TensorError, TensorFigures
from lightning_quant.nn.attention_mixin import SLOTS
from lightning_quant.nn.layers import QuantizedLayer
from lightning_quant.nn.structure import in_float, quantizers_of
from lightning_quant.quantizers import Quantizer

INPUT, WEIGHT = "input", "weight"
_TENSORS = (f"{INPUT}_quantizer", f"{WEIGHT}_quantizer", *SLOTS)
Run = Callable[[], list[Tensor]]
"""The network on inputs that are always the same, to its outputs."""


@dataclass(frozen=True)
class LayerAnalysis:
    """One quantized layer, or one opened attention.

    Attributes:
        name: of the module.
        kind: its class in float.
        shape: of the weight; empty for an attention.
        groups: quantizers of the input or of the softmax among which channels or rows choose; 0 for one.
        tensors: figures of "weight", "input", "query", "key", "value" and "softmax", as far as they are quantized.
        only_quantized: error of the network's outputs where only this one is quantized; None where not measured.
        only_float: the same where all but this one are.
        moves: how far the outputs of a network that was trained quantized move, of their norm, when only this one's
            quantizers are off; None for others, and where not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    tensors: Mapping[str, TensorFigures]
    only_quantized: float | None = None
    only_float: float | None = None
    moves: float | None = None

    @property
    def cost(self) -> float | None:
        """Figure that layers are ranked by; None where it was not measured."""
        return self.moves if self.only_quantized is None else self.only_quantized


def owners_of(network: nn.Module) -> dict[str, dict[str, Quantizer]]:
    """Slots that are filled and started, by the name of the layer or attention that has them."""
    found: dict[str, dict[str, Quantizer]] = {}
    # A shared module has several names; the first is enough.
    seen: set[int] = set()
    for name, quantizer in quantizers_of(network):
        owner, _, slot = name.rpartition(".")
        if slot in _TENSORS and quantizer.ready and id(quantizer) not in seen:
            seen.add(id(quantizer))
            found.setdefault(owner, {})[slot.removesuffix("_quantizer")] = quantizer
    return found


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """``norm(found - expected) / norm(expected)`` over all tensors.

    Raises:
        QuantizationError: outputs of other sizes than the float network's.

    Example:
        >>> relative_error([Tensor([3.0, 5.0])], [Tensor([3.0, 4.0])])
        0.2
    """
    if [each.shape for each in found] != [each.shape for each in expected]:
        raise QuantizationError(
            "The quantized network gives tensors of other sizes than the float one for the same inputs, as detectors"
            " do, so that its error cannot be measured: analyze with sensitivity=False."
        )
    apart = math.sqrt(
        sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    )
    size = math.sqrt(sum(float(b.double().square().sum()) for b in expected))
    return apart / size if size else (math.inf if apart else 0.0)


def measure_tensors(network: nn.Module, run: Run) -> list[LayerAnalysis]:
    """Figures of all quantized tensors in one run."""
    owners = owners_of(network)
    errors = {
        (owner, slot): TensorError(quantizer, *_channels(network.get_submodule(owner), slot))
        for owner, slots in owners.items()
        for slot, quantizer in slots.items()
    }
    for (owner, slot), error in errors.items():
        if slot == WEIGHT:
            error.update(cast(QuantizedLayer, network.get_submodule(owner)).weight)
    with _watched(network, owners, errors):
        run()
    return [_described(network, owner, slots, errors) for owner, slots in owners.items()]


def measure_layers(
    network: nn.Module,
    run: Run,
    layers: Sequence[LayerAnalysis],
    expected: Sequence[Tensor],
    trained: bool,
    advance: Callable[[str], object],
) -> list[LayerAnalysis]:
    """Add to each layer what it does to the outputs.

    Args:
        network: Quantized network, in evaluation.
        run: Calls of the network.
        layers: Layers of the network, without these figures.
        expected: Outputs in float, or of the quantized network if it was trained so.
        trained: Whether the weights were trained with the quantizers.
        advance: Function that is told the name of each layer when it is measured.
    """
    names = {layer.name for layer in layers}
    found = []
    for layer in layers:
        with in_float(network, {layer.name}):
            without = relative_error(run(), expected)
        if trained:
            found.append(replace(layer, moves=without))
        else:
            with in_float(network, names - {layer.name}):
                found.append(replace(layer, only_quantized=relative_error(run(), expected), only_float=without))
        advance(layer.name)
    return found


def _channels(module: nn.Module, slot: str) -> tuple[int, bool]:
    """Channel axis of a tensor, and whether each channel has a grid of its own."""
    if slot == WEIGHT:
        quantizer = cast(QuantizedLayer, module).weight_quantizer
        axis = getattr(quantizer, "axis", None)
        return (0 if axis is None else axis), axis is not None
    convolution = slot == INPUT and cast(QuantizedLayer, module).weight.dim() > 2
    return (1 if convolution else -1), False


@contextmanager
def _watched(
    network: nn.Module,
    owners: Mapping[str, Mapping[str, Quantizer]],
    errors: Mapping[tuple[str, str], TensorError],
) -> Iterator[None]:
    """Each tensor on its way into its quantizer goes to its error too."""

    def listen(error: TensorError) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        asks = False

        def heard(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal asks
            # The error itself asks the quantizer.
            if asks or not args:
                return
            asks = True
            try:
                error.update(args[0])
            finally:
                asks = False

        return heard

    with ExitStack() as stack:
        for owner, slots in owners.items():
            for slot, quantizer in slots.items():
                if slot == WEIGHT:
                    continue
                # A learned quantizer of a layer is not called, the product takes its range.
                at = network.get_submodule(owner) if slot == INPUT else quantizer
                handle = at.register_forward_pre_hook(listen(errors[owner, slot]))
                stack.callback(handle.remove)
        yield


def _described(
    network: nn.Module, owner: str, slots: Mapping[str, Quantizer], errors: Mapping[tuple[str, str], TensorError]
) -> LayerAnalysis:
    module: Any = network.get_submodule(owner)
    figures = {slot: errors[owner, slot].figures() for slot in slots}
    return LayerAnalysis(
        name=owner,
        kind=module.float_class.__name__,
        shape=tuple(module.weight.shape) if isinstance(module, QuantizedLayer) else (),
        groups=max((int(getattr(quantizer, "groups", 0)) for quantizer in slots.values()), default=0),
        tensors={slot: each for slot, each in figures.items() if each is not None},
    )
