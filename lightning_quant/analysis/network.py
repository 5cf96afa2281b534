"""Comparison of a quantized network with its float version on recorded calls."""

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
    """Effects of quantization on a network.

    Attributes:
        layers: Quantized layers and opened attentions, in the order of the network.
        left_out: Names of the Linear and Conv layers that are in float.
        error: Error ``norm(quantized - float) / norm(float)`` of the outputs; None if not measured, or if the network
            was trained quantized and no float network was given.
        agreement: Fraction of images with the same top class; None if the outputs are not logits (n, classes).
        images: Number of images in the recorded calls.
        float_seconds: Median time of the recorded calls in float.
        quantized_seconds: Median time of the recorded calls quantized. It is simulated, so it does not reflect the
            speed of low-bit hardware.
        float_bytes: Size of the parameters in FP32.
        quantized_bytes: Size of the parameters with the quantized weights as packed codes.
        float_bops: Bit operations per image of the first recorded call in float; None if they cannot be counted.
        quantized_bops: Bit operations per image with the bit-widths of each layer; None if they cannot be counted.
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
    """Repeat recorded calls: quantized, in float, and with each layer separately.

    Without its quantizers, a network that was trained quantized is not a valid float network. It is compared with
    ``float_network`` if that is given, and its layers are measured by the change of the outputs when their quantizers
    are turned off.

    This takes about ten runs of all calls, and two more runs per layer with ``sensitivity``. The network is in
    evaluation mode during the analysis and is restored afterwards.

    Args:
        network: Quantized network, see :func:`~lightning_quant.analysis.quantized_root`.
        calls: Calls of its forward from a :class:`~lightning_quant.analysis.Recorder`.
        sensitivity: Whether to measure the layers one by one.
        advance: Function that is called with the name of each layer after it is measured.
        trained: Whether the weights were trained with the quantizers.
        float_network: Function that returns a context in which the network is the float one for the comparison. None
            removes the quantizers, unless the network was trained with them.

    Raises:
        QuantizationError: No quantizer is initialized, there is no call, or the outputs contain no tensor.
    """
    if not calls:
        raise QuantizationError(
            f"No call of {type(network).__name__}, which contains all quantized layers, was recorded: analyze after a"
            " run that calls it."
        )

    def run() -> list[Tensor]:
        return [tensor for call in calls for tensor in tensors_of(call.run(network))]

    # no_grad instead of inference mode, whose tensors a quantizer could cache and later training could not use.
    with torch.no_grad(), evaluating(network):
        layers = measure_tensors(network, run)
        if not layers:
            raise QuantizationError(
                f"Nothing in {type(network).__name__} is quantized: analyze after training or calibration with"
                " GradientQuantization, IGQViT or AccuQuant."
            )
        quantized, quantized_seconds = _timed(run)
        with in_float(network):
            plain, float_seconds = _timed(run)
        if not plain:
            raise QuantizationError(
                f"{type(network).__name__} returns no floating-point tensor, so there is nothing to compare."
            )
        expected = None if trained else plain
        if float_network is not None:
            with float_network():
                expected = run()
        comparable = expected is not None and _shapes(quantized) == _shapes(expected)
        if sensitivity and _shapes(quantized) == _shapes(plain):
            layers = measure_layers(network, run, layers, quantized if trained else plain, trained, advance)
        bops = _bops(network, calls[0], layers)
    return Analysis(
        layers=layers,
        left_out=_left_out(network),
        error=relative_error(quantized, expected) if expected is not None and comparable else None,
        agreement=_agreement(quantized, expected) if expected is not None and comparable else None,
        images=sum(call.images for call in calls),
        float_seconds=float_seconds,
        quantized_seconds=quantized_seconds,
        float_bytes=4 * sum(parameter.numel() for parameter in network.parameters()),
        quantized_bytes=_packed_bytes(network),
        float_bops=None if bops is None else bops[0],
        quantized_bops=None if bops is None else bops[1],
    )


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return all floating-point tensors in the output of a forward, in order.

    Example:
        >>> [tensor.shape for tensor in tensors_of({"a": torch.zeros(1), "b": [torch.ones(2), 3]})]
        [torch.Size([1]), torch.Size([2])]
    """
    match outputs:
        case Tensor():
            return [outputs] if outputs.is_floating_point() else []
        case Mapping():
            return [tensor for output in outputs.values() for tensor in tensors_of(output)]
        case list() | tuple():
            return [tensor for output in outputs for tensor in tensors_of(output)]
        case _ if hasattr(outputs, "__dict__"):
            return tensors_of(vars(outputs))
        case _:
            return []


def trained_quantized(module: nn.Module) -> bool:
    """Return whether the weights of a module were trained with its quantizers, that is with learned ranges.

    Example:
        >>> trained_quantized(nn.Linear(2, 2))
        False
    """
    return any(isinstance(quantizer, LearnedQuantizer) and quantizer.ready for _, quantizer in quantizers_of(module))


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _timed(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
    outputs, seconds = run(), []
    for _ in range(_TIMED):
        start = time.perf_counter()
        run()
        if outputs and outputs[0].is_cuda:
            torch.cuda.synchronize(outputs[0].device)
        seconds.append(time.perf_counter() - start)
    return outputs, statistics.median(seconds)


def _agreement(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    if any(logits.dim() != 2 or logits.shape[1] < 2 for logits in expected):
        return None
    equal = [a.argmax(1) == b.argmax(1) for a, b in zip(outputs, expected, strict=True)]
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
