"""Autograd function of a quantized layer, which quantizes, multiplies, and saves codes instead of float copies.

The forward product and both backward products run on integer codes, with the scales in the weight or applied to the
result (see ``nn.operands``). Saved for the backward pass are:

* the input with one byte per value (code, residual and clip mask, see ``functional.compression``), or the input itself
  if the operation before it saves its output anyway (such as a ReLU);
* the weight, which exists anyway, and its codes in int8.

With Y = X * W, the gradients of the two ranges need no further pass over the residuals. By bilinearity
``sum(dXq * Xq) = sum(dWq * Wq)``, where dXq and dWq are the gradients before the clip masks, so that

    range * dL/drange = sum(dWq * Wq) - sum(dX * X)      (and likewise with dW and W for the weight)

where dX is masked: each term is grad * (quantized - real) inside the clamp and grad * quantized outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_quant.functional.blocks import sampled
from lightning_quant.functional.clamp_gradient import quantized_backward
from lightning_quant.functional.compression import codes_of, container, pack
from lightning_quant.functional.grid import Grid, encode, exact_in, per_channel
from lightning_quant.functional.integer_products import INTEGER_PRODUCTS
from lightning_quant.functional.products import Product
from lightning_quant.nn.modes import untraced
from lightning_quant.nn.operands import Codes, fan, inner, joint, operands, real, scaled, shortest, with_weight
from lightning_quant.quantizers import LearnedQuantizer

# Operations that save their own output for backward, so that a reference to it costs no memory.
KEEPS_OUTPUT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0", "ExpBackward0"}


class GradientQuantizerLike(Protocol):
    """Interface of a quantizer for the gradient of a layer's output."""

    def quantize(self, gradient: Tensor) -> Codes:
        """Return the codes of a gradient, which must not be written to."""
        ...

    @property
    def grid(self) -> Grid:
        """Smallest and largest code."""
        ...


@dataclass(frozen=True)
class Recipe:
    """Product and quantizers of a layer; None keeps a tensor in float.

    Attributes:
        source: Leaf tensor from which the weight derives, or the weight itself. Its gradient tells whether the
            gradients of the ranges are stale.
    """

    product: Product
    input: LearnedQuantizer | None
    weight: LearnedQuantizer | None
    gradient: GradientQuantizerLike | None
    source: Tensor | None = None


def quantized_product(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """Compute ``product(Qa(x), Qw(weight)) + bias``, differentiable in x, weight, bias and the two ranges.

    The gradient of the output is quantized once and used in both backward products. The gradients are straight-through
    for the rounding and zero where a clamp acts. Source: Kim et al., "Toward INT4 Fixed-Point Training", ECCV 2024.

    Under autocast the products run in its dtype if that represents all codes exactly, otherwise in FP32. Codes are
    always computed in FP32.

    Args:
        x: Batched input of the layer.
        weight: Weight in the layout of the product.
        bias: Bias of shape (out,), or None.
        recipe: Product and initialized quantizers.

    Returns:
        Output in the dtype of the products.
    """
    # Without gradients nothing is saved, so packing the input would be wasted.
    keeps_output = not torch.is_grad_enabled() or (x.grad_fn is not None and x.grad_fn.name() in KEEPS_OUTPUT)
    dtype = _compute_dtype(x, recipe)
    # The ranges of a frozen layer belong to its weight and do not train.
    ranges = [None if q is None else q.range for q in (recipe.input, recipe.weight)]
    ranges = [r if r is None or weight.requires_grad else r.detach() for r in ranges]
    result: Tensor = _QuantizedProduct.apply(x, weight, bias, *ranges, recipe, dtype, keeps_output)
    return result


def _compute_dtype(x: Tensor, recipe: Recipe) -> torch.dtype:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    quantizers = (recipe.input, recipe.weight, recipe.gradient)
    exact = all(exact_in(dtype, q.grid) for q in quantizers if q is not None)
    return dtype if exact else torch.float32


def _encode(x: Tensor, quantizer: LearnedQuantizer | None) -> Codes:
    if quantizer is None:
        return Codes(x)
    scale = quantizer.scale.detach()
    return Codes(encode(x, scale, quantizer.grid), scale, quantizer.grid)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_range: Tensor | None,
        weight_range: Tensor | None,
        recipe: Recipe,
        dtype: torch.dtype,
        keeps_output: bool,
    ) -> Tensor:
        output_dtype = dtype
        if isinstance(recipe.product, INTEGER_PRODUCTS):
            dtype = torch.float32  # int8 codes are cast from whole numbers: no headroom for FP16 is needed
        inputs, weights = _encode(x, recipe.input), _encode(weight, recipe.weight)
        with torch.autocast(x.device.type, enabled=False):
            w, v, scales = with_weight(weights, inputs, fan(weight), dtype, recipe.product)
            output = scaled(recipe.product(v, w), *scales)
            if bias is not None:
                output.add_(bias if weight.dim() == 2 else per_channel(bias, 1, weight.dim()))
        ctx.recipe, ctx.dtype, ctx.x_shape, ctx.x_dtype = recipe, dtype, x.shape, x.dtype
        saved_input, ctx.packed = _save_input(x, inputs, keeps_output)
        weight_codes = None if weights.grid is None else shortest(weights.values, weights.grid)
        # Needed only if the input itself is not saved.
        sample = sampled(x) if ctx.packed and ctx.needs_input_grad[3] else None
        ctx.save_for_backward(saved_input, weight, weight_codes, bias, inputs.scale, weights.scale, sample)
        return output.to(output_dtype)

    @staticmethod
    @once_differentiable
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved_input, weight, weight_codes, bias, input_scale, weight_scale, sample = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        needs_x, needs_weight, needs_bias, learns_input, learns_weight = ctx.needs_input_grad[:5]
        _drop_stale_gradients(weight if recipe.source is None else recipe.source, recipe)
        if recipe.input is not None and learns_input:
            recipe.input.sample = sampled(saved_input) if sample is None else sample
        if recipe.weight is not None and learns_weight:
            recipe.weight.sample = sampled(weight)

        output = Codes(grad) if recipe.gradient is None else recipe.gradient.quantize(grad)
        weights = Codes(weight)
        if recipe.weight is not None:
            weights = Codes(weight_codes, weight_scale, recipe.weight.grid)
        grad_x = grad_weight = grad_bias = grad_input_range = grad_weight_range = None
        inputs = input_inner = weight_inner = product_inner = None
        if needs_x or learns_input:
            grad_x, input_inner, inputs = _input_gradient(ctx, output, weights, saved_input, input_scale)
            grad_x = grad_x.to(ctx.x_dtype) if needs_x else None
        if needs_weight:
            inputs = inputs or _codes_of_input(ctx, saved_input, input_scale)
            grad_weight = _weight_gradient(ctx, output, inputs, weight)
            if learns_input or learns_weight:
                product_inner = inner(grad_weight, real(weights))
            if recipe.weight is not None:
                grad_weight, weight_inner, _ = quantized_backward(
                    grad_weight, weight, weight_scale, recipe.weight.grid, packed=False
                )
                grad_weight = grad_weight.to(weight.dtype)
        if learns_input:
            grad_input_range = _range_gradient(recipe.input, product_inner, input_inner)
        if learns_weight:
            grad_weight_range = _range_gradient(recipe.weight, product_inner, weight_inner)
        if needs_bias:
            grad_bias = _bias_gradient(output, recipe.product.channel_axis).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_input_range, grad_weight_range, None, None, None


def _input_gradient(
    ctx: Any, output: Codes, weights: Codes, saved_input: Tensor, input_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Codes | None]:
    """Compute the gradient of the input, its inner product with the input, and the codes of the input."""
    recipe: Recipe = ctx.recipe
    w, g, scales = with_weight(weights, output, fan(weights.values), ctx.dtype, recipe.product)
    grad = recipe.product.input_gradient(g, w, ctx.x_shape)
    if recipe.input is None or input_scale is None:
        return scaled(grad, *scales), None, None
    grid = recipe.input.grid
    grad, input_inner, codes = quantized_backward(grad, saved_input, input_scale, grid, ctx.packed, joint(scales))
    return grad, input_inner, Codes(codes, input_scale, grid)


def _weight_gradient(ctx: Any, output: Codes, inputs: Codes, weight: Tensor) -> Tensor:
    """Compute the gradient of the weight before its clip mask."""
    product: Product = ctx.recipe.product
    terms = output.values.numel() // output.values.shape[product.channel_axis]
    v, g, scales = operands(inputs, output, terms, ctx.dtype)
    return scaled(product.weight_gradient(g, v, weight.shape), *scales).to(weight.dtype)


def _bias_gradient(output: Codes, channel_axis: int) -> Tensor:
    """Compute the gradient of the bias, FP32."""
    values = output.values
    axes = [axis for axis in range(values.dim()) if axis != channel_axis % values.dim()]
    # An unbatched vector needs no sum, and an empty list of axes would mean all of them.
    total = values.sum(axes, dtype=torch.float32) if axes else values.float().clone()
    return scaled(total, output.scale)


def _range_gradient(
    quantizer: LearnedQuantizer | None, product_inner: Tensor | None, real_inner: Tensor | None
) -> Tensor:
    """Compute dL/drange from ``sum(dWq * Wq)`` and ``sum(dX * X)`` or ``sum(dW * W)``, see the module's docstring."""
    assert quantizer is not None
    assert product_inner is not None
    assert real_inner is not None
    return (product_inner - real_inner) / quantizer.range


def _save_input(x: Tensor, codes: Codes, keeps_output: bool) -> tuple[Tensor, bool]:
    """Return the form in which the input is saved for backward, and whether it is packed."""
    holder = None if codes.grid is None or keeps_output else container(codes.grid)
    if holder is None or codes.grid is None or codes.scale is None or holder[0].itemsize >= x.element_size():
        return x, False
    return pack(x, codes.values, codes.scale, codes.grid), True


def _codes_of_input(ctx: Any, saved_input: Tensor, scale: Tensor | None) -> Codes:
    """Compute the codes of the input if its gradient was not computed."""
    quantizer: LearnedQuantizer | None = ctx.recipe.input
    if quantizer is None or scale is None:
        return Codes(saved_input)
    codes = codes_of(saved_input, quantizer.grid) if ctx.packed else encode(saved_input, scale, quantizer.grid)
    return Codes(codes, scale, quantizer.grid)


def _drop_stale_gradients(source: Tensor, recipe: Recipe) -> None:
    """Drop gradients of the ranges that are older than the last ``zero_grad``.

    If the user's ``zero_grad`` set the gradient of the weight to None, the gradients of the ranges belong to a
    discarded loss (the generator step of a GAN also reaches the discriminator).
    """
    for quantizer in (recipe.input, recipe.weight):
        if quantizer is not None and source.is_leaf and source.grad is None:
            quantizer.range.grad = None
