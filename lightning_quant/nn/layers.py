"""Quantized Linear, Conv and ConvTranspose layers, by swapping the class of a layer.

A layer keeps its identity, parameters, hooks and keys in the state dict: only its class is replaced by a quantizing
one, and :func:`restore` puts the old class back. Code that holds a reference to the layer is not affected.
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
    """Mixin of a layer class that quantizes its input, its weight, and the gradient of its output.

    Instances come from :func:`swap`, not from the constructor. Each of the three quantizers may be None, which keeps
    its tensor in float. A quantizer that is not ready is initialized from its first tensor in training, and acts as
    the identity until then.
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
        """Return the product of this layer with its arguments."""
        raise NotImplementedError

    def grids(self) -> list[Grid] | None:
        """Return the grids of input, weight and gradient, or None if one of them is in float or undecided."""
        quantizers = [getattr(self, name) for name in QUANTIZERS]
        if any(q is None or getattr(q, "signed", True) is None for q in quantizers):
            return None
        return [q.grid for q in quantizers]

    def runs_integer(self) -> bool:
        """Return whether products run on int8 codes: this is enabled, and all three tensors have int8 codes."""
        if self.execution != "integer":
            return False
        for quantizer in (self.input_quantizer, self.weight_quantizer):
            # A quantizer that is not ready is the identity and has no codes.
            if not isinstance(quantizer, LearnedQuantizer) or not quantizer.ready:
                return False
        grids = self.grids()
        return grids is not None and all(map(fits_int8, grids))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        before, quantizer = self.weight.detach(), self.weight_quantizer
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A change of dtype changes the bits, but it is still the same weight.
        if quantizer is not None and self.weight.dtype != before.dtype and quantizer.knows(before):
            quantizer.adopt(self.weight)
        return self

    def sets_state(self) -> bool:
        """Return whether the next forward or backward sets state: it initializes a range or quantizes a gradient."""
        quantizers = (self.input_quantizer, self.weight_quantizer)
        if any(q is not None and not q.ready for q in quantizers):
            return True
        return torch.is_grad_enabled() and all(q is None or isinstance(q, LearnedQuantizer) for q in quantizers)

    def quantized_forward(self, x: Tensor, product: Product) -> Tensor:
        """Compute the output of the layer for a batched input."""
        # A frozen layer in evaluation mode must be initialized too, but not by a validation before training.
        starting = self.training or torch.is_grad_enabled()
        # Read it once: a parametrization computes it at each access, and may take a step in training.
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
        # Quantizers of a calibration, which have no gradient of their own.
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
    """Quantized form of ``nn.Linear``."""

    def product(self, output_padding: Sequence[int] = ()) -> Product:
        """Return the linear product, on int8 codes if enabled."""
        return IntegerLinear() if self.runs_integer() else LinearProduct()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in) to (..., out)."""
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
        """Return whether products run on int8 codes. Grouped and transposed convolutions are always simulated."""
        return self.groups == 1 and not self.transposed and super().runs_integer()

    def _outer_padding(self) -> list[int] | None:
        """Return the padding to apply with ``F.pad`` before the product: all but symmetric zero padding."""
        both_sides = self._reversed_padding_repeated_twice
        if self.transposed:
            return None
        if self.padding_mode == "zeros" and both_sides[::2] == both_sides[1::2]:
            return None
        return both_sides

    def product(self, output_padding: Sequence[int] = ()) -> Product:
        """Return the convolution with the arguments of this layer, by unfold on int8 codes if enabled."""
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
        """Map (N, in, ...) or (in, ...) to (N, out, ...) or (out, ...)."""
        return self._run(input)


class _QuantizedConvTranspose(_QuantizedConvolution):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Map (N, in, ...) or (in, ...) to (N, out, ...) or (out, ...)."""
        layer = cast(Any, self)
        spatial = len(self.kernel_size)
        extra = layer._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return self._run(input, extra)


@register(nn.Conv1d)
class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """Quantized form of ``nn.Conv1d``."""


@register(nn.Conv2d)
class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """Quantized form of ``nn.Conv2d``."""


@register(nn.Conv3d)
class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """Quantized form of ``nn.Conv3d``."""


@register(nn.ConvTranspose1d)
class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """Quantized form of ``nn.ConvTranspose1d``."""


@register(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """Quantized form of ``nn.ConvTranspose2d``."""


@register(nn.ConvTranspose3d)
class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """Quantized form of ``nn.ConvTranspose3d``."""


def swap(
    layer: nn.Module,
    input_quantizer: Quantizer | None = None,
    weight_quantizer: Quantizer | None = None,
    gradient_quantizer: nn.Module | None = None,
    execution: Execution = "simulated",
) -> QuantizedLayer:
    """Turn a layer into its quantized form, in place.

    Args:
        layer: Layer of a class in ``LAYERS``, or of a subclass that computes the same.
        input_quantizer: Quantizer of the input. None keeps it in float.
        weight_quantizer: Quantizer of the weight, or None.
        gradient_quantizer: Quantizer of the gradient of the output, or None.
        execution: Execution of the products: "simulated", or "integer" to multiply int8 codes if all three tensors have
            them.

    Raises:
        UnsupportedModelError: The layer is of another class, or has its own forward.
        ConfigurationError: A gradient quantizer or "integer" is combined with forward quantizers that are not learned.

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
            "gradient_quantizer and execution='integer' need a LearnedQuantizer or None for the input and the weight,"
            f" but found {' and '.join(type(q).__name__ for q in forward)}."
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
    """Turn a quantized layer back into a float layer, with its current weight."""
    for name in QUANTIZERS:
        delattr(layer, name)
    del layer.execution
    exchange(layer, layer.float_class)
    return layer
