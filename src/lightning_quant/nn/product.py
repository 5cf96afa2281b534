"""One autograd node for a quantized layer: quantize, multiply, and keep codes instead of float copies.

Forward and both backward products run on integer codes; the scales are applied to the results (see
``functional.products``). What is kept for backward:

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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_quant.functional.compression import codes_of, container, pack, unpack
from lightning_quant.functional.grid import (
    Grid,
    encode,
    exact_in,
    is_inside,
    mask_gradient,
    per_channel,
    round_to_grid,
)
from lightning_quant.functional.products import Product
from lightning_quant.quantizers import LearnedQuantizer

# Operations that keep their own output for backward: a reference to it costs no memory.
KEEPS_OUTPUT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0", "ExpBackward0"}


class Codes(NamedTuple):
    """A tensor as ``values * scale``: integer codes and their step size, or any values and None for 1."""

    values: Tensor
    scale: Tensor | None
    grid: Grid | None


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
    """What a layer does, beside its tensors: the product, and the quantizers (None leaves a tensor in float)."""

    product: Product
    input: LearnedQuantizer | None
    weight: LearnedQuantizer | None
    gradient: GradientQuantizerLike | None


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
        recipe: product and quantizers; quantizers are initialised.

    Returns:
        the output, in the dtype of the products.
    """
    keeps_output = x.grad_fn is not None and x.grad_fn.name() in KEEPS_OUTPUT
    dtype = _compute_dtype(x, recipe)
    ranges = [None if q is None else q.range for q in (recipe.input, recipe.weight)]
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
        return Codes(x, None, None)
    scale = quantizer.scale.detach()
    return Codes(encode(x, scale, quantizer.grid), scale, quantizer.grid)


def _scaled(result: Tensor, *scales: Tensor | None) -> Tensor:
    """``result``, which nobody else holds, times the scales."""
    known = [scale for scale in scales if scale is not None]
    if known:
        result.mul_(known[0] if len(known) == 1 else known[0] * known[1])
    return result


def _headroom(a: Codes, b: Codes, terms: int, dtype: torch.dtype) -> float:
    """Power of two that keeps sums of products of codes within FP16, whose largest number is 65 504."""
    if dtype != torch.float16 or a.grid is None or b.grid is None:
        return 1.0
    bound = max(map(abs, a.grid)) * max(map(abs, b.grid)) * terms
    return 2.0 ** -max(0, bound.bit_length() - 15)


def _operands(a: Codes, b: Codes, terms: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The two factors in ``dtype``, and the scales that are left for their product."""
    if dtype == torch.float16 and (a.grid is None or b.grid is None):
        # Sums of codes times real values have no bound to make room for: multiply real values, as autocast does.
        a, b = (Codes(_real(c), None, None) for c in (a, b))
    room = _headroom(a, b, terms, dtype)
    if room == 1.0:
        return a.values.to(dtype), b.values.to(dtype), [a.scale, b.scale]
    assert a.scale is not None
    return (a.values * room).to(dtype), b.values.to(dtype), [a.scale / room, b.scale]


def _real(codes: Codes) -> Tensor:
    return codes.values if codes.scale is None else codes.values * codes.scale


def _fan(weight: Tensor) -> int:
    """An upper bound on the products in one element of the output or of the input's gradient."""
    return weight.numel() // min(weight.shape[:2])


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b in FP32, without a copy where both lie in memory in the same order."""
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return torch.dot(*(t.permute(order).reshape(-1).float() for t in (a, b)))


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
        inputs, weights = _encode(x, recipe.input), _encode(weight, recipe.weight)
        with torch.autocast(x.device.type, enabled=False):
            w, v, scales = _operands(weights, inputs, _fan(weight), dtype)
            output = _scaled(recipe.product(v, w), *scales)
            if bias is not None:
                output.add_(bias if weight.dim() == 2 else per_channel(bias, 1, weight.dim()))
        ctx.recipe, ctx.dtype, ctx.x_shape, ctx.x_dtype = recipe, dtype, x.shape, x.dtype
        kept, ctx.packed = _keep_input(x, inputs, keeps_output)
        weight_codes = None if weights.grid is None else _shortest(weights.values, weights.grid)
        ctx.save_for_backward(kept, weight, weight_codes, bias, inputs.scale, weights.scale)
        return output.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, weight_codes, bias, input_scale, weight_scale = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        needs_x, needs_weight, needs_bias, learns_input, learns_weight = ctx.needs_input_grad[:5]
        # A frozen layer keeps its ranges: they belong to the weight.
        learns_input, learns_weight = learns_input and needs_weight, learns_weight and needs_weight
        _forget_stale(weight, recipe)

        output = Codes(grad, None, None) if recipe.gradient is None else recipe.gradient.quantize(grad)
        grad_x = grad_weight = grad_bias = grad_input_range = grad_weight_range = None
        kept_input = _KeptInput(kept, ctx.packed, input_scale, recipe.input)
        own_input = own_weight = energy = None
        if needs_x or learns_input:
            weights = Codes(weight, None, None)
            if recipe.weight is not None:
                weights = Codes(weight_codes, weight_scale, recipe.weight.grid)
            w, g, scales = _operands(weights, output, _fan(weight), ctx.dtype)
            grad_x = kept_input.mask(_scaled(recipe.product.input_gradient(g, w, ctx.x_shape), *scales))
            if learns_input:
                own_input = kept_input.inner(grad_x)
            grad_x = grad_x.to(ctx.x_dtype) if needs_x else None
        if needs_weight:
            terms = grad.numel() // grad.shape[recipe.product.channel_axis]
            v, g, scales = _operands(kept_input.codes(), output, terms, ctx.dtype)
            grad_weight = _scaled(recipe.product.weight_gradient(g, v, weight.shape), *scales).to(weight.dtype)
            if learns_input or learns_weight:
                real = weight if recipe.weight is None else weight_codes * weight_scale
                energy = _inner(grad_weight, real)
        if needs_weight and recipe.weight is not None:
            grad_weight = mask_gradient(grad_weight, weight / weight_scale, recipe.weight.grid).to(weight.dtype)
            own_weight = _inner(grad_weight, weight)
        if learns_input:
            grad_input_range = (energy - own_input) / recipe.input.range
        if learns_weight:
            grad_weight_range = (energy - own_weight) / recipe.weight.range
        if needs_bias:
            axes = [axis for axis in range(grad.dim()) if axis != recipe.product.channel_axis % grad.dim()]
            grad_bias = _scaled(output.values.sum(axes, dtype=torch.float32), output.scale).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, grad_input_range, grad_weight_range, None, None, None


class _KeptInput:
    """The input as it was kept for backward. Ask for the mask and the inner product first, for the codes last."""

    def __init__(
        self, kept: Tensor, packed: bool, scale: Tensor | None, quantizer: LearnedQuantizer | None
    ) -> None:
        self.kept, self.packed, self.scale = kept, packed, scale
        self.grid = None if quantizer is None else quantizer.grid
        self.positions: Tensor | None = None

    def mask(self, grad: Tensor) -> Tensor:
        """The gradient where the clamp does not act."""
        if self.grid is None or self.scale is None:
            return grad
        self.positions = unpack(self.kept, self.grid) if self.packed else _wide(self.kept) / self.scale
        return mask_gradient(grad, self.positions, self.grid)

    def inner(self, masked: Tensor) -> Tensor:
        """Sum of a masked gradient times the input."""
        assert self.positions is not None
        return _inner(masked, self.positions) * self.scale

    def codes(self) -> Codes:
        """Codes of the input; consumes the positions."""
        if self.grid is None or self.scale is None:
            return Codes(self.kept, None, None)
        if self.packed:
            values = codes_of(self.kept, self.grid)
        elif self.positions is not None:
            values = round_to_grid(self.positions, self.grid)
        else:
            values = encode(self.kept, self.scale, self.grid)
        return Codes(values, self.scale, self.grid)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _shortest(codes: Tensor, grid: Grid) -> Tensor:
    """The codes in the shortest integer dtype that holds them."""
    for dtype in (torch.int8, torch.uint8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= grid.low and grid.high <= limits.max:
            return codes.to(dtype)
    return codes.to(torch.int32)


def _keep_input(x: Tensor, codes: Codes, keeps_output: bool) -> tuple[Tensor, bool]:
    """What is kept of the input for backward, and whether it is packed."""
    holder = None if codes.grid is None or keeps_output else container(codes.grid)
    if holder is None or codes.grid is None or codes.scale is None or holder[0].itemsize >= x.element_size():
        return x, False
    return pack(x, codes.values, codes.scale, codes.grid), True


def _forget_stale(weight: Tensor, recipe: Recipe) -> None:
    """Drop gradients of the ranges that outlived the weight's.

    Where the user's ``zero_grad`` set the weight's gradient to None, the ranges' belong to a loss that was thrown away
    (a GAN's generator step reaches the discriminator). Several uses of a layer in one backward pass add up.
    """
    task = torch._C._current_graph_task_id()
    for quantizer in (recipe.input, recipe.weight):
        if quantizer is not None and weight.is_leaf and weight.grad is None and quantizer.last_backward != task:
            quantizer.range.grad = None
        if quantizer is not None:
            quantizer.last_backward = task
