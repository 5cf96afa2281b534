"""Statistics of each quantized layer and opened attention, and its effect on the output of the network."""

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
"""Function that runs the network on fixed inputs and returns its outputs."""


@dataclass(frozen=True)
class LayerAnalysis:
    """Analysis of a quantized layer or an opened attention.

    Attributes:
        name: Name of the module.
        kind: Name of the float class.
        shape: Shape of the weight; empty for an attention.
        groups: Number of groups of the input or softmax quantizer; 0 for a quantizer without groups.
        tensors: Statistics of "weight", "input", "query", "key", "value" and "softmax", as far as they are quantized.
        only_quantized: Error of the network's outputs if only this layer is quantized; None if not measured.
        only_float: Error of the network's outputs if all layers except this one are quantized; None if not measured.
        moves: Relative change of the outputs when only this layer's quantizers are turned off, for networks that were
            trained quantized; None for others, or if not measured.
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
        """Error by which layers are ranked; None if not measured."""
        return self.moves if self.only_quantized is None else self.only_quantized


def owners_of(network: nn.Module) -> dict[str, dict[str, Quantizer]]:
    """Return the initialized quantizers by slot, for each layer or attention by name."""
    owners: dict[str, dict[str, Quantizer]] = {}
    # A shared module has several names, of which the first is used.
    seen: set[int] = set()
    for name, quantizer in quantizers_of(network):
        owner, _, slot = name.rpartition(".")
        if slot in _TENSORS and quantizer.ready and id(quantizer) not in seen:
            seen.add(id(quantizer))
            owners.setdefault(owner, {})[slot.removesuffix("_quantizer")] = quantizer
    return owners


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compute ``norm(outputs - expected) / norm(expected)`` over all tensors.

    Raises:
        QuantizationError: The outputs have other sizes than those of the float network.

    Example:
        >>> relative_error([Tensor([3.0, 5.0])], [Tensor([3.0, 4.0])])
        0.2
    """
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        raise QuantizationError(
            "The quantized network returns tensors of other sizes than the float network for the same inputs, as"
            " detectors do, so its error cannot be measured: analyze with sensitivity=False."
        )
    difference = math.sqrt(
        sum(float((a.double() - b.double()).square().sum()) for a, b in zip(outputs, expected, strict=True))
    )
    size = math.sqrt(sum(float(b.double().square().sum()) for b in expected))
    return difference / size if size else (math.inf if difference else 0.0)


def measure_tensors(network: nn.Module, run: Run) -> list[LayerAnalysis]:
    """Measure the statistics of all quantized tensors in one run."""
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
    return [_describe(network, owner, slots, errors) for owner, slots in owners.items()]


def measure_layers(
    network: nn.Module,
    run: Run,
    layers: Sequence[LayerAnalysis],
    expected: Sequence[Tensor],
    trained: bool,
    advance: Callable[[str], object],
) -> list[LayerAnalysis]:
    """Measure the effect of each layer on the outputs.

    Args:
        network: Quantized network in evaluation mode.
        run: Function that runs the network.
        layers: Layers of the network without these errors.
        expected: Outputs of the float network, or of the quantized one if it was trained quantized.
        trained: Whether the weights were trained with the quantizers.
        advance: Function that is called with the name of each layer after it is measured.
    """
    names = {layer.name for layer in layers}
    measured = []
    for layer in layers:
        with in_float(network, {layer.name}):
            without = relative_error(run(), expected)
        if trained:
            measured.append(replace(layer, moves=without))
        else:
            with in_float(network, names - {layer.name}):
                measured.append(replace(layer, only_quantized=relative_error(run(), expected), only_float=without))
        advance(layer.name)
    return measured


def _channels(module: nn.Module, slot: str) -> tuple[int, bool]:
    """Return the channel axis of a tensor, and whether each channel has its own grid."""
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
    """Pass each tensor that goes into a quantizer to its TensorError as well."""

    def hook_of(error: TensorError) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        updating = False

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal updating
            # The update itself calls the quantizer.
            if updating or not args:
                return
            updating = True
            try:
                error.update(args[0])
            finally:
                updating = False

        return hook

    with ExitStack() as stack:
        for owner, slots in owners.items():
            for slot, quantizer in slots.items():
                if slot == WEIGHT:
                    continue
                # A learned quantizer of a layer is never called, since the product uses its range.
                module = network.get_submodule(owner) if slot == INPUT else quantizer
                handle = module.register_forward_pre_hook(hook_of(errors[owner, slot]))
                stack.callback(handle.remove)
        yield


def _describe(
    network: nn.Module, owner: str, slots: Mapping[str, Quantizer], errors: Mapping[tuple[str, str], TensorError]
) -> LayerAnalysis:
    module: Any = network.get_submodule(owner)
    figures = {slot: errors[owner, slot].figures() for slot in slots}
    return LayerAnalysis(
        name=owner,
        kind=module.float_class.__name__,
        shape=tuple(module.weight.shape) if isinstance(module, QuantizedLayer) else (),
        groups=max((int(getattr(quantizer, "groups", 0)) for quantizer in slots.values()), default=0),
        tensors={slot: statistics for slot, statistics in figures.items() if statistics is not None},
    )
