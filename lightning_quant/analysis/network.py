"""A quantized network on recorded calls, against itself in float."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.analysis.layers import INPUT, LayerAnalysis, measure_layers, measure_tensors, relative_error
from lightning_quant.analysis.recording import Call
from lightning_quant.errors import QuantizationError, UnsupportedModelError
from lightning_quant.functional.grid import FLOAT_BITS
from lightning_quant.metrics.bops import LayerShape, measure_shapes, model_bops
from lightning_quant.nn.layers import LAYERS, QuantizedLayer
from lightning_quant.nn.modes import evaluating
from lightning_quant.nn.structure import in_float, quantized_layers, quantizers_of
from lightning_quant.quantizers import LearnedQuantizer, Quantizer

_TIMED = 3


@dataclass(frozen=True)
class Analysis:
    """What quantization does to a network.

    Attributes:
        layers: quantized layers and opened attentions, in the order of the network.
        left_out: names of its Linear and Conv layers that are in float.
        error: ``norm(quantized - float) / norm(float)`` of the outputs; None where it was not measured, and where a
            network was trained quantized and its float one is not named.
        agreement: share of equal largest classes, where the outputs are logits (n, classes).
        images: rows of the recorded calls.
        float_seconds: median time of the recorded calls in float.
        quantized_seconds: the same quantized; simulated, so that it says nothing of low-bit units.
        float_bytes: parameters in FP32.
        quantized_bytes: the same with the quantized weights as packed codes.
        float_bops: bit operations of the first recorded call for an image; None where they cannot be counted.
        quantized_bops: the same with the bits of each layer.
    """

    layers: Sequence[LayerAnalysis]
    left_out: Sequence[str]
    error: float | None
    agreement: float | None
    images: int
    float_seconds: float
    quantized_seconds: float
    float_bytes: int
    quantized_bytes: int
    float_bops: int | None
    quantized_bops: int | None


def analyze_network(
    network: nn.Module,
    calls: Sequence[Call],
    sensitivity: bool = True,
    advance: Callable[[str], object] = lambda name: None,
    trained: bool = False,
    float_network: Callable[[], AbstractContextManager[None]] | None = None,
) -> Analysis:
    """Make recorded calls again: quantized, in float, and with each layer alone.

    The weights of a network that was trained quantized are no float network without their quantizers: it is compared
    with the one that is given, or with none, and a layer by how far the outputs move when its quantizers are off.

    Takes two runs of all calls for each layer with ``sensitivity``, and about ten without. The network is in
    evaluation meanwhile, and is left as it was.

    Args:
        network: quantized, as :func:`~lightning_quant.analysis.quantized_root` finds it.
        calls: of its forward, as a :class:`~lightning_quant.analysis.Recorder` keeps them.
        sensitivity: whether the layers are measured one by one.
        advance: told the name of each layer that was measured one by one.
        trained: Whether the weights were trained with the quantizers.
        float_network: Makes a context in which the network is the float one to compare with; None takes its quantizers
            off, where it was not trained with them.

    Raises:
        QuantizationError: nothing that is quantized and started, no call, or outputs without a tensor.
    """
    if not calls:
        raise QuantizationError(
            f"No call of {type(network).__name__} was recorded, which holds all that is quantized: analyze after a run"
            " that called it."
        )

    def run() -> list[Tensor]:
        return [tensor for call in calls for tensor in tensors_of(call.run(network))]

    # Not inference mode: what a quantizer keeps of a weight would be unusable in a training after this.
    with torch.no_grad(), evaluating(network):
        layers = measure_tensors(network, run)
        if not layers:
            raise QuantizationError(
                f"Nothing in {type(network).__name__} is quantized: analyze after it was trained or calibrated with"
                " GradientQuantization, IGQViT or AccuQuant."
            )
        found, quantized_seconds = _timed(run)
        with in_float(network):
            plain, float_seconds = _timed(run)
        if not plain:
            raise QuantizationError(
                f"{type(network).__name__} gives no tensor of floating point, so that nothing can be compared."
            )
        expected = None if trained else plain
        if float_network is not None:
            with float_network():
                expected = run()
        comparable = expected is not None and _shapes(found) == _shapes(expected)
        if sensitivity and _shapes(found) == _shapes(plain):
            layers = measure_layers(network, run, layers, found if trained else plain, trained, advance)
        bops = _bops(network, calls[0], layers)
    return Analysis(
        layers=layers,
        left_out=_left_out(network),
        error=relative_error(found, expected) if expected is not None and comparable else None,
        agreement=_agreement(found, expected) if expected is not None and comparable else None,
        images=sum(call.images for call in calls),
        float_seconds=float_seconds,
        quantized_seconds=quantized_seconds,
        float_bytes=4 * sum(parameter.numel() for parameter in network.parameters()),
        quantized_bytes=_packed_bytes(network),
        float_bops=None if bops is None else bops[0],
        quantized_bops=None if bops is None else bops[1],
    )


def tensors_of(outputs: Any) -> list[Tensor]:
    """All tensors of floating point in what a forward returns, in their order.

    Example:
        >>> [each.shape for each in tensors_of({"a": torch.zeros(1), "b": [torch.ones(2), 3]})]
        [torch.Size([1]), torch.Size([2])]
    """
    match outputs:
        case Tensor():
            return [outputs] if outputs.is_floating_point() else []
        case Mapping():
            return [tensor for each in outputs.values() for tensor in tensors_of(each)]
        case list() | tuple():
            return [tensor for each in outputs for tensor in tensors_of(each)]
        case _ if hasattr(outputs, "__dict__"):
            return tensors_of(vars(outputs))
        case _:
            return []


def trained_quantized(module: nn.Module) -> bool:
    """Whether the weights of a module were trained with its quantizers, whose ranges are learned then.

    Example:
        >>> trained_quantized(nn.Linear(2, 2))
        False
    """
    return any(isinstance(quantizer, LearnedQuantizer) and quantizer.ready for _, quantizer in quantizers_of(module))


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [each.shape for each in tensors]


def _timed(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
    found, seconds = run(), []
    for _ in range(_TIMED):
        start = time.perf_counter()
        run()
        if found and found[0].is_cuda:
            torch.cuda.synchronize(found[0].device)
        seconds.append(time.perf_counter() - start)
    return found, statistics.median(seconds)


def _agreement(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    if any(each.dim() != 2 or each.shape[1] < 2 for each in expected):
        return None
    equal = [a.argmax(1) == b.argmax(1) for a, b in zip(found, expected, strict=True)]
    return float(torch.cat(equal).float().mean())


def _packed_bytes(network: nn.Module) -> int:
    bits = {id(p): FLOAT_BITS for p in network.parameters()}
    for _, layer in quantized_layers(network):
        if isinstance(layer.weight_quantizer, Quantizer):
            bits[id(layer.weight)] = layer.weight_quantizer.bits
    return sum(parameter.numel() * bits[id(parameter)] + 7 for parameter in network.parameters()) // 8


def _left_out(network: nn.Module) -> list[str]:
    kinds = tuple(LAYERS)
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, kinds) and not isinstance(module, QuantizedLayer)
    ]


def _bops(network: nn.Module, call: Call, layers: Sequence[LayerAnalysis]) -> tuple[int, int] | None:
    by_name = {layer.name: layer for layer in layers}
    try:
        shapes = measure_shapes(network, *call.args, run=lambda *args: network(*args, **call.kwargs))
    except (UnsupportedModelError, IndexError, TypeError):
        return None
    plain = model_bops(shapes, FLOAT_BITS, FLOAT_BITS, first=None).total
    return plain, sum(_bops_of(shape, by_name.get(shape.name)) for shape in shapes)


def _bops_of(shape: LayerShape, layer: LayerAnalysis | None) -> int:
    tensors = {} if layer is None else layer.tensors

    def bits(name: str) -> int:
        return tensors[name].bits if name in tensors else FLOAT_BITS

    operand = max(bits(name) for name in ("query", "key", "value", "softmax")) if shape.kind == "attention" else None
    groups = {shape.name: layer.groups} if layer is not None and layer.groups and shape.kind == "linear" else 0
    weight, activation = (FLOAT_BITS, operand) if operand is not None else (bits("weight"), bits(INPUT))
    return model_bops([shape], weight, activation, groups, first=None).total
