"""One autograd node for a quantized layer: quantize, multiply, and keep codes instead of float copies.

Forward and both backward products run on integer codes, with the scales in the weight or applied to the result (see
``nn.operands``). What is kept for backward:

* the input as one byte a value (code, residual and clip mask, see ``functional.compression``), or the input itself
  where the operation before it keeps its output anyway (a ReLU): there a code beside it would be extra;
* the weight, which lives anyway, and its codes in int8.

With Y = X * W, the two range gradients come without another pass over the residuals. By bilinearity
``sum(dXq * Xq) = sum(dWq * Wq)``, where dXq and dWq are the gradients before the clip masks, so that

    range * dL/drange = sum(dWq * Wq) - sum(dX * X)      (and likewise with dW and W for the weight)

where dX is masked: inside the clamp each term is grad * (quantized - real), outside it is grad * quantized.
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
from lightning_quant.nn.operands import Codes, fan, inner, joint, operands, scaled, shortest, with_weight
from lightning_quant.quantizers import LearnedQuantizer

# Operations that keep their own output for backward: a reference to it costs no memory.
KEEPS_OUTPUT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0", "ExpBackward0"}


class GradientQuantizerLike(Protocol):
    """What a layer needs of a quantizer of the gradient of its output."""

    def quantize(self, gradient: Tensor) -> Codes:
        """Codes of a gradient, which must not be written to."""
        ...

    @property
    def grid(self) -> Grid:
        """Smallest and largest code."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What a layer does, beside its tensors: the product, and the quantizers (None leaves a tensor in float).

    Attributes:
        source: Leaf that the weight is or derives from, whose gradient tells whether those of the ranges are of now.
    """

    product: Product
    input: LearnedQuantizer | None
    weight: LearnedQuantizer | None
    gradient: GradientQuantizerLike | None
    source: Tensor | None = None


def quantized_product(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """``product(Qa(x), Qw(weight)) + bias``, differentiable in x, weight, bias and the two ranges.

    Source: Kim et al., "Toward INT4 Fixed-Point Training", ECCV 2024; the gradient of the output is quantized once and
    used in both backward products, straight-through for the rounding, zero where a clamp acts.

    Under autocast the products run in its dtype if that holds all codes exactly, else in FP32; codes are
    always computed in FP32.

    Args:
        x: input of the layer, batched.
        weight: as the product wants it.
        bias: (out,), or None.
        recipe: product and quantizers; quantizers are initialized.

    Returns:
        the output, in the dtype of the products.
    """
    # Without gradients nothing is kept, and so nothing is worth packing.
    keeps_output = not torch.is_grad_enabled() or (x.grad_fn is not None and x.grad_fn.name() in KEEPS_OUTPUT)
    dtype = _compute_dtype(x, recipe)
    # A frozen layer keeps its ranges, which belong to the weight, and needs no graph for them.
    both = [None if q is None else q.range for q in (recipe.input, recipe.weight)]
    ranges = [r if r is None or weight.requires_grad else r.detach() for r in both]
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
            dtype = torch.float32  # int8 codes are made of whole numbers: no room for FP16 is needed
        inputs, weights = _encode(x, recipe.input), _encode(weight, recipe.weight)
        with torch.autocast(x.device.type, enabled=False):
            w, v, scales = with_weight(weights, inputs, fan(weight), dtype, recipe.product)
            output = scaled(recipe.product(v, w), *scales)
            if bias is not None:
                output.add_(bias if weight.dim() == 2 else per_channel(bias, 1, weight.dim()))
        ctx.recipe, ctx.dtype, ctx.x_shape, ctx.x_dtype = recipe, dtype, x.shape, x.dtype
        kept, ctx.packed = _keep_input(x, inputs, keeps_output)
        weight_codes = None if weights.grid is None else shortest(weights.values, weights.grid)
        # Where the input itself is kept there is no need of it.
        sample = sampled(x) if ctx.packed and ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, weight, weight_codes, bias, inputs.scale, weights.scale, sample)
        return output.to(output_dtype)

    @staticmethod
    @once_differentiable
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, weight_codes, bias, input_scale, weight_scale, sample = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        needs_x, needs_weight, needs_bias, learns_input, learns_weight = ctx.needs_input_grad[:5]
        _forget_stale(weight if recipe.source is None else recipe.source, recipe)
        if recipe.input is not None and learns_input:
            recipe.input.sample = sampled(kept) if sample is None else sample
        if recipe.weight is not None and learns_weight:
            recipe.weight.sample = sampled(weight)

        output = Codes(grad) if recipe.gradient is None else recipe.gradient.quantize(grad)
        grad_x = grad_weight = grad_bias = grad_input_range = grad_weight_range = None
        inputs: Codes | None = None
        own_input = own_weight = energy = None
        if needs_x or learns_input:
            weights = Codes(weight)
            if recipe.weight is not None:
                weights = Codes(weight_codes, weight_scale, recipe.weight.grid)
            w, g, scales = with_weight(weights, output, fan(weight), ctx.dtype, recipe.product)
            grad_x = recipe.product.input_gradient(g, w, ctx.x_shape)
            if recipe.input is None:
                grad_x = scaled(grad_x, *scales)
            else:
                grad_x, own_input, codes = quantized_backward(
                    grad_x, kept, input_scale, recipe.input.grid, ctx.packed, joint(scales)
                )
                inputs = Codes(codes, input_scale, recipe.input.grid)
            grad_x = grad_x.to(ctx.x_dtype) if needs_x else None
        if needs_weight:
            terms = grad.numel() // grad.shape[recipe.product.channel_axis]
            inputs = inputs or _codes_of_input(ctx, kept, input_scale)
            v, g, scales = operands(inputs, output, terms, ctx.dtype)
            grad_weight = scaled(recipe.product.weight_gradient(g, v, weight.shape), *scales).to(weight.dtype)
            if learns_input or learns_weight:
                energy = inner(grad_weight, weight if recipe.weight is None else weight_codes * weight_scale)
            if recipe.weight is not None:
                grad_weight, own_weight, _ = quantized_backward(
                    grad_weight, weight, weight_scale, recipe.weight.grid, packed=False
                )
                grad_weight = grad_weight.to(weight.dtype)
        if learns_input:
            grad_input_range = _range_gradient(recipe.input, energy, own_input)
        if learns_weight:
            grad_weight_range = _range_gradient(recipe.weight, energy, own_weight)
        if needs_bias:
            axes = [axis for axis in range(grad.dim()) if axis != recipe.product.channel_axis % grad.dim()]
            # Of an unbatched vector there is nothing to sum, and an empty list of axes would mean all.
            total = output.values.sum(axes, dtype=torch.float32) if axes else output.values.float().clone()
            grad_bias = scaled(total, output.scale).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_input_range, grad_weight_range, None, None, None


def _range_gradient(quantizer: LearnedQuantizer | None, energy: Tensor | None, own: Tensor | None) -> Tensor:
    """dL/drange, from the two sums in the module's description."""
    assert quantizer is not None
    assert energy is not None
    assert own is not None
    return (energy - own) / quantizer.range


def _keep_input(x: Tensor, codes: Codes, keeps_output: bool) -> tuple[Tensor, bool]:
    """What is kept of the input for backward, and whether it is packed."""
    holder = None if codes.grid is None or keeps_output else container(codes.grid)
    if holder is None or codes.grid is None or codes.scale is None or holder[0].itemsize >= x.element_size():
        return x, False
    return pack(x, codes.values, codes.scale, codes.grid), True


def _codes_of_input(ctx: Any, kept: Tensor, scale: Tensor | None) -> Codes:
    """Codes of the input where its gradient is not asked for."""
    quantizer: LearnedQuantizer | None = ctx.recipe.input
    if quantizer is None or scale is None:
        return Codes(kept)
    codes = codes_of(kept, quantizer.grid) if ctx.packed else encode(kept, scale, quantizer.grid)
    return Codes(codes, scale, quantizer.grid)


def _forget_stale(source: Tensor, recipe: Recipe) -> None:
    """Drop gradients of the ranges that outlived the weight's.

    Where the user's ``zero_grad`` set the weight's gradient to None, the ranges' belong to a loss that was thrown away
    (a GAN's generator step reaches the discriminator).
    """
    for quantizer in (recipe.input, recipe.weight):
        if quantizer is not None and source.is_leaf and source.grad is None:
            quantizer.range.grad = None
