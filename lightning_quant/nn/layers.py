"""Quantized Linear, Conv and ConvTranspose layers, by a change of class.

A layer keeps its identity, its parameters, its hooks and its place in the state dict: only its class is
exchanged for one that quantizes, and exchanged back by :func:`restore`. Nothing that holds the layer notices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.functional.grid import Grid
from lightning_quant.functional.integer_products import IntegerConvolution, IntegerLinear, fits_int8
from lightning_quant.functional.products import ConvolutionProduct, LinearProduct, Product
from lightning_quant.nn.forms import LAYERS, exchange, layer_form, obstacle, register
from lightning_quant.nn.modes import untraced
from lightning_quant.nn.product import GradientQuantizerLike, Recipe, quantized_product
from lightning_quant.nn.quantized_module import QuantizedModule
from lightning_quant.quantizers import LearnedQuantizer, Quantizer

__all__ = ["LAYERS", "QUANTIZERS", "Execution", "QuantizedLayer", "register", "restore", "swap"]

Execution = Literal["simulated", "integer"]
QUANTIZERS = ("input_quantizer", "weight_quantizer", "gradient_quantizer")


class QuantizedLayer(QuantizedModule):
    """Mixin of a layer class: quantizes its input, its weight, and the gradient of its output.

    Made by :func:`swap`, never called. Each of the three quantizers may be None, which leaves that tensor in float.
    A quantizer that is not ready initializes itself from the first tensor in training, and is the identity before.
    """

    quantizer_slots = QUANTIZERS
    input_quantizer: Quantizer | None
    weight_quantizer: Quantizer | None
    gradient_quantizer: nn.Module | None
    execution: Execution
    weight: Tensor
    bias: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            forward = untraced(cls.forward, when=lambda module, *_, **__: module.sets_state())
            cls.forward = forward  # type: ignore[method-assign]

    def product(self, output_padding: Sequence[int] = ()) -> Product:
        """The product of this layer with its arguments."""
        raise NotImplementedError

    def grids(self) -> list[Grid] | None:
        """Grids of input, weight and gradient, None where one of them is in float or not yet decided."""
        quantizers = [getattr(self, name) for name in QUANTIZERS]
        if any(q is None or getattr(q, "signed", True) is None for q in quantizers):
            return None
        return [q.grid for q in quantizers]

    def runs_integer(self) -> bool:
        """Whether products run on int8 codes: asked for, and all three tensors have codes that fit int8."""
        if self.execution != "integer":
            return False
        for quantizer in (self.input_quantizer, self.weight_quantizer):
            # Before it is ready a quantizer is the identity, and there are no codes.
            if not isinstance(quantizer, LearnedQuantizer) or not quantizer.ready:
                return False
        grids = self.grids()
        return grids is not None and all(map(fits_int8, grids))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        before, quantizer = self.weight.detach(), self.weight_quantizer
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # In another dtype it is the same weight, though its bits are others.
        if quantizer is not None and self.weight.dtype != before.dtype and quantizer.knows(before):
            quantizer.adopt(self.weight)
        return self

    def sets_state(self) -> bool:
        """Whether the next forward, or its backward, sets state: ranges that begin, gradients that are quantized."""
        quantizers = (self.input_quantizer, self.weight_quantizer)
        if any(q is not None and not q.ready for q in quantizers):
            return True
        return torch.is_grad_enabled() and all(q is None or isinstance(q, LearnedQuantizer) for q in quantizers)

    def quantized_forward(self, x: Tensor, product: Product) -> Tensor:
        """Output of the layer for a batched input."""
        # A frozen layer in evaluation mode must start too; a validation before training must not.
        starting = self.training or torch.is_grad_enabled()
        # Once: a parametrization derives it anew each time, and may take a step in training.
        weight = self.weight
        for quantizer, tensor in ((self.input_quantizer, x), (self.weight_quantizer, weight)):
            if quantizer is None or quantizer.ready:
                continue
            if starting:
                quantizer.initialize(tensor)
            else:
                quantizer.refresh_ready()
        active = [q if q is not None and q.ready else None for q in (self.input_quantizer, self.weight_quantizer)]
        if all(q is None or isinstance(q, LearnedQuantizer) for q in active):
            first, second = cast("list[LearnedQuantizer | None]", active)
            gradient = cast("GradientQuantizerLike | None", self.gradient_quantizer)
            leaf = not torch.is_grad_enabled() or weight.is_leaf
            source = weight if leaf else next((p for p in self.parameters() if p.requires_grad), weight)
            return quantized_product(x, weight, self.bias, Recipe(product, first, second, gradient, source))
        of_input, of_weight = active
        if of_weight is not None:
            of_weight.check(weight)
        inputs = x if of_input is None else of_input(x)
        weight = weight if of_weight is None else of_weight(weight)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        output = product(inputs.to(dtype), weight.to(dtype))
        return output if self.bias is None else output + self.bias.to(dtype).view(-1, *[1] * (weight.dim() - 2))


@register(nn.Linear)
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` whose product runs on quantized tensors."""

    def product(self, output_padding: Sequence[int] = ()) -> Product:
        """The linear product, on int8 codes where that was asked for."""
        return IntegerLinear() if self.runs_integer() else LinearProduct()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(..., in) to (..., out)."""
        return self.quantized_forward(input, self.product())


class _QuantizedConvolution(QuantizedLayer):
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    transposed: bool
    groups: int
    _reversed_padding_repeated_twice: list[int]

    def runs_integer(self) -> bool:
        """As for other layers; grouped and transposed convolutions are simulated."""
        return self.groups == 1 and not self.transposed and super().runs_integer()

    def _outer_padding(self) -> list[int] | None:
        """What has to be padded before the product, as ``F.pad`` takes it: all that is not zeros on both sides."""
        both_sides = self._reversed_padding_repeated_twice
        if self.transposed:
            return None
        if self.padding_mode == "zeros" and both_sides[::2] == both_sides[1::2]:
            return None
        return both_sides

    def product(self, output_padding: Sequence[int] = ()) -> Product:
        """The convolution with this layer's arguments, by unfold on int8 codes where that was asked for."""
        spatial = len(self.kernel_size)
        padding = (0,) * spatial
        if self._outer_padding() is None:
            padding = self.padding if not isinstance(self.padding, str) else self._same_padding()
        extra = tuple(output_padding) or (0,) * spatial
        kind = IntegerConvolution if self.runs_integer() else ConvolutionProduct
        return kind(self.stride, padding, self.dilation, self.transposed, extra, self.groups)

    def _same_padding(self) -> tuple[int, ...]:
        return tuple(reversed(self._reversed_padding_repeated_twice[::2]))

    def _run(self, x: Tensor, output_padding: Sequence[int] = ()) -> Tensor:
        batched = x.dim() == len(self.kernel_size) + 2
        x = x if batched else x.unsqueeze(0)
        outer = self._outer_padding()
        if outer is not None:
            x = F.pad(x, outer, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        output = self.quantized_forward(x, self.product(output_padding))
        return output if batched else output.squeeze(0)


class _QuantizedConv(_QuantizedConvolution):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(N, in, ...) or (in, ...) to (N, out, ...) or (out, ...)."""
        return self._run(input)


class _QuantizedConvTranspose(_QuantizedConvolution):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """(N, in, ...) or (in, ...) to (N, out, ...) or (out, ...)."""
        layer = cast(Any, self)
        spatial = len(self.kernel_size)
        extra = layer._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return self._run(input, extra)


@register(nn.Conv1d)
class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` whose product runs on quantized tensors."""


@register(nn.Conv2d)
class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` whose product runs on quantized tensors."""


@register(nn.Conv3d)
class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` whose product runs on quantized tensors."""


@register(nn.ConvTranspose1d)
class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` whose product runs on quantized tensors."""


@register(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose product runs on quantized tensors."""


@register(nn.ConvTranspose3d)
class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` whose product runs on quantized tensors."""


def swap(
    layer: nn.Module,
    input_quantizer: Quantizer | None = None,
    weight_quantizer: Quantizer | None = None,
    gradient_quantizer: nn.Module | None = None,
    execution: Execution = "simulated",
) -> QuantizedLayer:
    """Turn a layer into its quantized form, in place.

    Args:
        layer: of one of the classes in ``LAYERS``, or of a subclass that computes as one of them does.
        input_quantizer: None leaves the input in float, and so for the other two.
        weight_quantizer: see above.
        gradient_quantizer: see above.
        execution: "integer" multiplies int8 codes where all three tensors have them.

    Raises:
        UnsupportedModelError: a layer of another class, or with a forward of its own.
        ConfigurationError: a gradient quantizer or integers with other forward quantizers than learned ones.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> swap(layer, LearnedQuantizer(4), LearnedQuantizer(4, signed=True)) is layer
        True
        >>> type(layer).__name__, type(restore(layer)).__name__
        ('QuantizedLinear', 'Linear')
    """
    reason = obstacle(layer)
    if reason:
        raise UnsupportedModelError(f"{reason}.")
    forward = (input_quantizer, weight_quantizer)
    learned = all(q is None or isinstance(q, LearnedQuantizer) for q in forward)
    if not learned and (gradient_quantizer is not None or execution == "integer"):
        raise ConfigurationError(
            "A gradient_quantizer and execution='integer' need a LearnedQuantizer or None for the input and the weight,"
            f" found {' and '.join(type(q).__name__ for q in forward)}."
        )
    form = layer_form(type_before_parametrizations(layer))
    assert form is not None
    exchange(layer, form)
    quantized = cast(QuantizedLayer, layer)
    device = next((parameter.device for parameter in layer.parameters()), None)
    quantized.execution = execution
    for name, quantizer in zip(QUANTIZERS, (input_quantizer, weight_quantizer, gradient_quantizer), strict=True):
        quantized.register_module(name, quantizer)
        if quantizer is not None:
            quantizer.to(device).train(layer.training)
    return quantized


def restore(layer: QuantizedLayer) -> nn.Module:
    """Turn a quantized layer back into the float layer it was, with the weight it has now."""
    for name in QUANTIZERS:
        delattr(layer, name)
    del layer.execution
    exchange(layer, layer.float_class)
    return layer
