"""Bit operations of a network: multiplications weighted by the bit-widths of both operands.

The overhead of choosing groups for each image is derived from Moon et al., "Instance-Aware Group Quantization for
Vision Transformers", CVPR 2024 (arXiv 2404.00928): the +3.3 % that it states for DeiT-B at 16 groups comes out.
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

# Bits of an operation in float.
F = 32
_PRODUCTS_OF_AN_ATTENTION = 2


@dataclass(frozen=True)
class LayerShape:
    """What one layer computes for one image.

    Attributes:
        name: of the module.
        kind: what is multiplied: input and weight, or in an attention query and key, then softmax and value.
        tokens: rows of the input; output positions of a convolution; queries of one window of an attention.
        in_features: length of each product; in an attention the channels of all heads.
        out_features: output channels; keys of one window of an attention.
        windows: of an attention.
    """

    name: str
    kind: Literal["linear", "convolution", "attention"]
    tokens: int
    in_features: int
    out_features: int
    windows: int = 1


@dataclass(frozen=True)
class ModelBops:
    """Bit operations for one image.

    Attributes:
        layers: of each layer, by its name.
    """

    layers: Mapping[str, int]

    @property
    def total(self) -> int:
        """Sum over the layers."""
        return sum(self.layers.values())


def fully_connected_bops(
    tokens: int, in_features: int, out_features: int, weight_bits: int, activation_bits: int, groups: int = 0
) -> int:
    """``N Cin Dout bw ba``, and with groups ``F (2 N Cin + 4 Cin G + G N Dout)`` more.

    The three summands are the minimum and maximum of each channel, its distances to the centres of the groups, and
    the partial sums of each group, which are scaled and added in float.

    Args:
        tokens: N.
        in_features: Cin.
        out_features: Dout.
        weight_bits: bw.
        activation_bits: ba.
        groups: G; 0 is a layer-wise quantizer, which needs none of this.

    Raises:
        ConfigurationError: more groups than channels, or less than none.

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
    """``N M C ba^2`` in each window: one of the two products of an attention.

    Args:
        tokens: N, queries of one window.
        channels: C, of all heads.
        bits: ba, of both operands.
        windows: of one image.
        keys: M, of one window; None: as many as queries.

    Example:
        >>> attention_bops(4, 8, bits=2, windows=3)
        1536
    """
    return windows * tokens * (tokens if keys is None else keys) * channels * bits**2


def convolution_bops(
    positions: int, in_features: int, out_features: int, weight_bits: int, activation_bits: int
) -> int:
    """As a fully connected layer at each output position, over the values of one patch.

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
    """Bit operations of a network for one image.

    The groups of softmax rows are left out: one comparison a probability, and no partial sums.

    Args:
        shapes: of :func:`measure_shapes`.
        weight_bits: of all layers; 32 is float.
        activation_bits: of all layers and of both operands of the products in attention; 32 is float.
        groups: of fully connected layers by their name, those not named are layer-wise; or one number for all of
            several tokens, or as many as they have channels.
        first: bits of the input of the first convolution, the patch embedding; None: as the others.

    Raises:
        ConfigurationError: groups of a layer that is not among the shapes, not fully connected, or has fewer channels.

    Example:
        >>> shapes = [LayerShape("embed", "convolution", 4, 12, 8), LayerShape("fc", "linear", 4, 8, 16)]
        >>> model_bops(shapes, 4, 4).layers
        {'embed': 12288, 'fc': 8192}
        >>> model_bops(shapes, 32, 32, first=None).total
        917504
    """
    chosen = groups if isinstance(groups, Mapping) else _same(shapes, groups)
    linear = {shape.name for shape in shapes if shape.kind == "linear"}
    if unknown := sorted(chosen.keys() - linear):
        raise ConfigurationError(
            f"groups of '{unknown[0]}', which is no fully connected layer of this network: there are"
            f" {', '.join(sorted(linear)) or 'none'}."
        )
    embedding = next((shape for shape in shapes if shape.kind == "convolution"), None)
    layers: dict[str, int] = {}
    for shape in shapes:
        bits = first if shape is embedding and first is not None else activation_bits
        bops = _layer_bops(shape, weight_bits, bits, chosen.get(shape.name, 0))
        layers[shape.name] = layers.get(shape.name, 0) + bops
    return ModelBops(layers)


def measure_shapes(network: nn.Module, *inputs: Any, run: Callable[..., object] | None = None) -> list[LayerShape]:
    """What each layer of a network computes for one image, in the order of the forward; also on the meta device.

    One forward in evaluation mode without gradients. Attentions that are known and not yet open are opened for it,
    and closed again; one that is not known is not counted, see :func:`~lightning_quant.nn.check_attentions`. An
    observer that an attention has sees this forward too.

    Args:
        network: any with Linear, Conv and known attention modules, quantized or not.
        inputs: of its forward, the first a tensor (images, ...) or a sequence of images.
        run: what to call with the inputs in place of the network, to the same effect.

    Raises:
        UnsupportedModelError: where no such layer was called.

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
            f"A forward of {type(network).__name__} called no Linear, no Conv and no known attention: nothing to count."
        )
    return _per_image(calls, len(inputs[0]))


def _same(shapes: Iterable[LayerShape], groups: int) -> dict[str, int]:
    several = [shape for shape in shapes if shape.kind == "linear" and shape.tokens > 1]
    return {shape.name: min(groups, shape.in_features) for shape in several}


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
    """All known attentions open."""
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
    """Every call of a layer or an attention is recorded, with the rows and windows of all images."""
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
    """Observer of one attention that records its shape, and passes everything on."""

    def __init__(
        self, name: str, record: Callable[[LayerShape], None], behind: Callable[[str, Tensor], None] | None
    ) -> None:
        self.name, self.record, self.behind = name, record, behind
        self.channels = 0

    def __call__(self, slot: str, tensor: Tensor) -> None:
        if slot == "query_quantizer":
            self.channels = tensor.shape[-3] * tensor.shape[-1]
        elif slot == "softmax_quantizer":
            queries, keys = tensor.shape[-2:]
            windows = math.prod(tensor.shape[:-3])
            self.record(LayerShape(self.name, "attention", queries, self.channels, keys, windows))
        if self.behind is not None:
            self.behind(slot, tensor)


def _per_image(calls: Sequence[LayerShape], images: int) -> list[LayerShape]:
    """The calls of a layer put together; what does not depend on the images, a position table, is not shared out."""
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
