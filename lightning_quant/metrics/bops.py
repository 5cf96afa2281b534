"""Bit operations (BOPs) of a network: multiplications weighted by the bit-widths of both operands.

The overhead of assigning groups for each image is derived from Moon et al., "Instance-Aware Group Quantization for
Vision Transformers", CVPR 2024 (arXiv 2404.00928), and reproduces its +3.3 % for DeiT-B with 16 groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.nn import (
    QuantizedAttention,
    attention_form,
    restore_attention,
    swap_attention,
    swapped_attentions,
)
from lightning_quant.nn.modes import evaluating

# Bit-width of an operation in float.
F = 32
_PRODUCTS_OF_AN_ATTENTION = 2


@dataclass(frozen=True)
class LayerShape:
    """Shape of a layer's computation for one image.

    Attributes:
        name: Name of the module.
        kind: Kind of the layer. A linear layer or convolution multiplies input and weight; an attention multiplies
            query and key, then softmax and value.
        tokens: Number of rows of the input, of output positions of a convolution, or of queries in one window of an
            attention.
        in_features: Length of each inner product; channels of all heads for an attention.
        out_features: Number of output channels; keys in one window for an attention.
        windows: Number of windows of an attention.
    """

    name: str
    kind: Literal["linear", "convolution", "attention"]
    tokens: int
    in_features: int
    out_features: int
    windows: int = 1


@dataclass(frozen=True)
class ModelBops:
    """Bit operations of a network for one image.

    Attributes:
        layers: Bit operations of each layer by its name.
    """

    layers: Mapping[str, int]

    @property
    def total(self) -> int:
        """Sum over all layers."""
        return sum(self.layers.values())


def fully_connected_bops(
    tokens: int, in_features: int, out_features: int, weight_bits: int, activation_bits: int, groups: int = 0
) -> int:
    """Compute ``N Cin Dout bw ba``, plus ``F (2 N Cin + 4 Cin G + G N Dout)`` with groups.

    The three terms are the minimum and maximum of each channel, its distances to the centers of the groups, and the
    partial sums of each group, which are scaled and added in float.

    Args:
        tokens: Number of tokens N.
        in_features: Number of input channels Cin.
        out_features: Number of output channels Dout.
        weight_bits: Bit-width bw of the weight.
        activation_bits: Bit-width ba of the input.
        groups: Number of groups G. 0 is a layer-wise quantizer without this overhead.

    Raises:
        ConfigurationError: ``groups`` is negative or larger than the number of channels.

    Example:
        >>> fully_connected_bops(2, 3, 5, 4, 8)
        960
        >>> fully_connected_bops(2, 3, 5, 4, 8, groups=1) - 960 == 32 * (2 * 2 * 3 + 4 * 3 + 2 * 5)
        True
    """
    if not 0 <= groups <= in_features:
        raise ConfigurationError(f"groups={groups}: expected 0 (layer-wise) .. {in_features}, the number of channels.")
    products = tokens * in_features * out_features * weight_bits * activation_bits
    if not groups:
        return products
    return products + F * (2 * tokens * in_features + 4 * in_features * groups + groups * tokens * out_features)


def attention_bops(tokens: int, channels: int, bits: int, windows: int = 1, keys: int | None = None) -> int:
    """Compute ``N M C ba^2`` per window for one of the two products of an attention.

    Args:
        tokens: Number of queries N in one window.
        channels: Number of channels C of all heads.
        bits: Bit-width ba of both operands.
        windows: Number of windows in one image.
        keys: Number of keys M in one window. Default: the number of queries.

    Example:
        >>> attention_bops(4, 8, bits=2, windows=3)
        1536
    """
    return windows * tokens * (tokens if keys is None else keys) * channels * bits**2


def convolution_bops(
    positions: int, in_features: int, out_features: int, weight_bits: int, activation_bits: int
) -> int:
    """Compute the bit operations of a convolution: a fully connected layer over one patch at each output position.

    Example:
        >>> convolution_bops(196, 3 * 16 * 16, 768, 4, 8) == 196 * 768 * 768 * 4 * 8
        True
    """
    return fully_connected_bops(positions, in_features, out_features, weight_bits, activation_bits)


def model_bops(
    shapes: Sequence[LayerShape],
    weight_bits: int,
    activation_bits: int,
    groups: Mapping[str, int] | int = 0,
    first: int | None = 8,
) -> ModelBops:
    """Compute the bit operations of a network for one image.

    The overhead of groups of softmax rows is neglected: it is one comparison per probability, without partial sums.

    Args:
        shapes: Shapes from :func:`measure_shapes`.
        weight_bits: Bit-width of all weights; 32 is float.
        activation_bits: Bit-width of all activations and of both operands of the products in attention; 32 is float.
        groups: Number of groups of fully connected layers by name (those not named are layer-wise), or one number for
            all fully connected layers with several tokens, limited by their number of channels.
        first: Bit-width of the input of the first convolution, the patch embedding. None means ``activation_bits``.

    Raises:
        ConfigurationError: A layer with groups is not among the shapes, not fully connected, or has fewer channels.

    Example:
        >>> shapes = [LayerShape("embed", "convolution", 4, 12, 8), LayerShape("fc", "linear", 4, 8, 16)]
        >>> model_bops(shapes, 4, 4).layers
        {'embed': 12288, 'fc': 8192}
        >>> model_bops(shapes, 32, 32, first=None).total
        917504
    """
    groups_of = groups if isinstance(groups, Mapping) else _same(shapes, groups)
    linear = {shape.name for shape in shapes if shape.kind == "linear"}
    if unknown := sorted(groups_of.keys() - linear):
        raise ConfigurationError(
            f"groups has '{unknown[0]}', which is not a fully connected layer of this network: expected some of"
            f" {', '.join(sorted(linear)) or 'none'}."
        )
    embedding = next((shape for shape in shapes if shape.kind == "convolution"), None)
    layers: dict[str, int] = {}
    for shape in shapes:
        bits = first if shape is embedding and first is not None else activation_bits
        bops = _layer_bops(shape, weight_bits, bits, groups_of.get(shape.name, 0))
        layers[shape.name] = layers.get(shape.name, 0) + bops
    return ModelBops(layers)


def measure_shapes(network: nn.Module, *inputs: Any, run: Callable[..., object] | None = None) -> list[LayerShape]:
    """Measure the shape of each layer's computation for one image, in the order of the forward.

    This runs one forward in evaluation mode without gradients, which also works on the meta device. Registered
    attentions are opened temporarily; attentions that are not registered are not counted, see
    :func:`~lightning_quant.nn.check_attentions`. Observers of attentions are called in this forward too.

    Args:
        network: Network with Linear, Conv and registered attention modules, quantized or not.
        inputs: Inputs of its forward. The first one is a tensor (images, ...) or a sequence of images.
        run: Function that is called with the inputs instead of the network and has to call it.

    Raises:
        UnsupportedModelError: The forward called no such layer.

    Example:
        >>> measure_shapes(nn.Sequential(nn.Linear(4, 8)), torch.zeros(2, 5, 4))
        [LayerShape(name='0', kind='linear', tokens=5, in_features=4, out_features=8, windows=1)]
    """
    calls: list[LayerShape] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(network))
        stack.enter_context(_opened(network))
        stack.enter_context(_watched(network, calls.append))
        (network if run is None else run)(*inputs)
    if not calls:
        raise UnsupportedModelError(
            f"The forward of {type(network).__name__} called no Linear, no Conv and no registered attention, so there"
            " is nothing to count."
        )
    return _per_image(calls, len(inputs[0]))


def _same(shapes: Iterable[LayerShape], groups: int) -> dict[str, int]:
    linear = [shape for shape in shapes if shape.kind == "linear" and shape.tokens > 1]
    return {shape.name: min(groups, shape.in_features) for shape in linear}


def _layer_bops(shape: LayerShape, weight_bits: int, activation_bits: int, groups: int) -> int:
    match shape.kind:
        case "attention":
            return _PRODUCTS_OF_AN_ATTENTION * attention_bops(
                shape.tokens, shape.in_features, activation_bits, shape.windows, shape.out_features
            )
        case "convolution":
            return convolution_bops(shape.tokens, shape.in_features, shape.out_features, weight_bits, activation_bits)
        case _:
            return fully_connected_bops(
                shape.tokens, shape.in_features, shape.out_features, weight_bits, activation_bits, groups
            )


@contextmanager
def _opened(network: nn.Module) -> Iterator[None]:
    """Open all registered attentions temporarily."""
    closed = [
        (name, module)
        for name, module in network.named_modules()
        if not isinstance(module, QuantizedAttention) and _can_be_opened(module)
    ]
    opened: list[QuantizedAttention] = []
    try:
        for name, module in closed:
            opened.append(swap_attention(module, parent=network.get_submodule(name.rpartition(".")[0])))
        yield
    finally:
        for attention in opened:
            restore_attention(attention)


def _can_be_opened(module: nn.Module) -> bool:
    form = attention_form(type(module))
    return form is not None and not form.obstacle(module)


@contextmanager
def _watched(network: nn.Module, record: Callable[[LayerShape], None]) -> Iterator[None]:
    """Record every call of a layer or an attention, with the rows and windows of all images."""
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                handle = module.register_forward_hook(partial(_record_layer, record, name))
                stack.callback(handle.remove)
        for name, attention in swapped_attentions(network):
            watcher = _Watcher(name, record, attention.observer)
            stack.callback(setattr, attention, "observer", attention.observer)
            attention.observer = watcher
        yield


def _record_layer(
    record: Callable[[LayerShape], None], name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    if isinstance(layer, nn.Linear):
        rows = output.numel() // layer.out_features
        record(LayerShape(name, "linear", rows, layer.in_features, layer.out_features))
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        patch = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        record(LayerShape(name, "convolution", output.numel() // layer.out_channels, patch, layer.out_channels))


class _Watcher:
    """Observer of an attention that records its shape and calls the previous observer."""

    def __init__(
        self, name: str, record: Callable[[LayerShape], None], previous: Callable[[str, Tensor], None] | None
    ) -> None:
        self.name, self.record, self.previous = name, record, previous
        self.channels = 0

    def __call__(self, slot: str, tensor: Tensor) -> None:
        if slot == "query_quantizer":
            self.channels = tensor.shape[-3] * tensor.shape[-1]
        elif slot == "softmax_quantizer":
            queries, keys = tensor.shape[-2:]
            windows = math.prod(tensor.shape[:-3])
            self.record(LayerShape(self.name, "attention", queries, self.channels, keys, windows))
        if self.previous is not None:
            self.previous(slot, tensor)


def _per_image(calls: Sequence[LayerShape], images: int) -> list[LayerShape]:
    """Merge the calls of each layer, and divide their rows or windows by the number of images, rounded up."""
    merged: dict[LayerShape, int] = {}
    for call in calls:
        one = replace(call, windows=1) if call.kind == "attention" else replace(call, tokens=1)
        merged[one] = merged.get(one, 0) + (call.windows if call.kind == "attention" else call.tokens)
    return [
        replace(one, windows=-(-count // images))
        if one.kind == "attention"
        else replace(one, tokens=-(-count // images))
        for one, count in merged.items()
    ]
