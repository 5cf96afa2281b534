"""Calibration pass, in which each layer gets its quantizers as its input arrives.

All images of a rank pass through the network as one batch. The hook of a layer sees its input for all images, already
quantized upstream, fits the quantizers, and lets the layer run with them. All layers are fitted in order in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.errors import QuantizationError
from lightning_quant.igq_vit.allocation import candidates
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.ranges import gram_matrix, weight_range
from lightning_quant.igq_vit.reparameterization import Reparameterization
from lightning_quant.igq_vit.schemes import (
    OPERAND_POWER,
    PATCH_BITS,
    UNGROUPED,
    WEIGHT_TAILS,
    Candidates,
    fit_input,
    fit_softmax,
    fixed,
    layer_wise,
)
from lightning_quant.igq_vit.settings import Settings
from lightning_quant.nn.attention import QuantizedAttention
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.grouped import InstanceQuantizer
from lightning_quant.utilities.autocast import full_precision
from lightning_quant.utilities.distributed import all_reduce_sum

Slot = tuple[str, str]
Advance = Callable[[str], None]


def calibrate(
    network: nn.Module, plan: VitPlan, forward: Callable[[], object], advance: Advance = lambda name: None
) -> dict[Slot, Candidates]:
    """Fit all quantizers and put them in their slots.

    Args:
        network: Network with swapped attentions and layers, all slots empty.
        plan: Plan of what to quantize.
        forward: Function that runs the network once on the calibration images of this rank.
        advance: Function that is called with the name of each finished module.

    Returns:
        Quantizers of each input, operand and softmax, keyed by number of groups. Those of ``settings.groups`` and
        ``settings.row_groups`` are in the slots.

    Raises:
        QuantizationError: NaN or infinite activations.
    """
    candidates_of: dict[Slot, Candidates] = {}
    pending: dict[Slot, Quantizer] = {}
    with torch.no_grad():
        norms = None
        if plan.settings.scheme == "repq":
            norms = Reparameterization(network, plan.names("grouped", "one token"), forward)
        with _Pass(network, plan, candidates_of, pending, advance, norms).hooks():
            forward()
        if norms is not None:
            with emptied(network, filled_slots(network)):
                norms.check()
    fill(network, pending)
    return candidates_of


def filled_slots(network: nn.Module) -> list[Slot]:
    """Return the slots of a network that hold a quantizer."""
    paths = [name.rpartition(".") for name, _ in quantizers_of(network)]
    return [(name, slot) for name, _, slot in paths]


@contextmanager
def emptied(network: nn.Module, slots: Iterable[Slot]) -> Iterator[None]:
    """Empty these slots within the context, which puts the network in float."""
    quantizers = {(name, slot): getattr(network.get_submodule(name), slot) for name, slot in slots}
    try:
        fill(network, dict.fromkeys(quantizers))
        yield
    finally:
        fill(network, quantizers)


def fill(network: nn.Module, quantizers: Mapping[Slot, Quantizer | None]) -> None:
    """Put quantizers into the slots of modules; None empties a slot."""
    for (name, slot), quantizer in quantizers.items():
        setattr(network.get_submodule(name), slot, quantizer)


class _Pass:
    """State of one calibration pass."""

    def __init__(
        self,
        network: nn.Module,
        plan: VitPlan,
        candidates_of: dict[Slot, Candidates],
        pending: dict[Slot, Quantizer],
        advance: Advance,
        norms: Reparameterization | None,
    ) -> None:
        self.network, self.plan, self.candidates_of, self.pending = network, plan, candidates_of, pending
        self.advance, self.norms = advance, norms

    @property
    def settings(self) -> Settings:
        return self.plan.settings

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        layers = {row.name: row.role for row in self.plan.rows if row.role in ("grouped", "one token", "patch")}
        for name, role in layers.items():
            fit = self._fit_convolution if role == "patch" else self._fit_linear
            handles.append(self.network.get_submodule(name).register_forward_pre_hook(_hook(fit, name)))
        attentions = self.plan.names("attention")
        for name in attentions:
            self._attention(name).observer = self._observer(name)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in attentions:
                self._attention(name).observer = None
            for quantizer in (q for quantizers in self.candidates_of.values() for q in quantizers.values()):
                if isinstance(quantizer, InstanceQuantizer):
                    # It was the number in this pass. Windowed attention sets it in each forward.
                    quantizer.instances = None

    def _attention(self, name: str) -> QuantizedAttention:
        module = self.network.get_submodule(name)
        assert isinstance(module, QuantizedAttention)
        return module

    def _fit_linear(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        check_finite(x, name)
        shape = self.plan.shape(name)
        images = x.numel() // (shape.tokens * shape.in_features)
        if self.norms is not None:
            x, quantizer = self.norms.apply(name, layer, x, self.settings)
            self._put(
                (name, "input_quantizer"), {UNGROUPED: quantizer or layer_wise(x, self._bits, self.settings, images)}
            )
        elif shape.tokens == 1:
            self._put((name, "input_quantizer"), {UNGROUPED: layer_wise(x, self._bits, self.settings, images)})
        else:
            sizes = self._sizes(self.settings.groups, shape.in_features)
            tokens = x.reshape(images, -1, shape.in_features)
            self._put((name, "input_quantizer"), fit_input(tokens, layer.weight, self.settings, sizes), images)
        low, high = weight_range(layer.weight, gram_matrix(x), self.settings.weight_bits, WEIGHT_TAILS)
        self._finish(name, fixed(low, high, self.settings.weight_bits, 0, self.settings.literal_zero_point))
        return x

    def _fit_convolution(self, name: str, layer: Any, x: Tensor) -> Tensor:
        check_finite(x, name)
        self._put((name, "input_quantizer"), {UNGROUPED: layer_wise(x, PATCH_BITS, self.settings, len(x))})
        gram = None
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding in ((0, 0), 0):
            patches = F.unfold(x.float(), layer.kernel_size, layer.dilation, 0, layer.stride)
            gram = gram_matrix(patches.transpose(1, 2))
        low, high = weight_range(layer.weight, gram, self.settings.weight_bits, WEIGHT_TAILS)
        self._finish(name, fixed(low, high, self.settings.weight_bits, 0, self.settings.literal_zero_point))
        return x

    def _observer(self, name: str) -> Callable[[str, Tensor], None]:
        def observe(slot: str, tensor: Tensor) -> None:
            with full_precision(tensor.device):
                fit(slot, tensor)

        def fit(slot: str, tensor: Tensor) -> None:
            check_finite(tensor, f"{slot.removesuffix('_quantizer')} of {name}")
            shape = self.plan.shape(name)
            images = len(tensor) // shape.windows
            if slot == "softmax_quantizer":
                sizes = self._sizes(self.settings.row_groups, self.plan.softmax_rows(name))
                self._put((name, slot), fit_softmax(tensor, self.settings, sizes, images))
                self.advance(name)
            else:
                self._put(
                    (name, slot), {UNGROUPED: layer_wise(tensor, self._bits, self.settings, images, OPERAND_POWER)}
                )

        return observe

    @property
    def _bits(self) -> int:
        return self.settings.activation_bits

    def _sizes(self, groups: int, limit: int) -> list[int]:
        return list(candidates(limit, also=groups)) if self.settings.allocates else [groups]

    def _put(self, slot: Slot, quantizers: Candidates, images: int | None = None) -> None:
        if slot in self.candidates_of:
            raise QuantizationError(
                f"{slot[0]} is called more than once per forward, or is shared: leave it in float with"
                f" exclude=[{slot[0]!r}]."
            )
        self.candidates_of[slot] = quantizers
        default = self.settings.groups if slot[1] == "input_quantizer" else self.settings.row_groups
        chosen = quantizers.get(default, next(iter(quantizers.values())))
        if isinstance(chosen, InstanceQuantizer):
            chosen.instances = images
        self._fill(slot, chosen)

    def _fill(self, slot: Slot, quantizer: Quantizer) -> None:
        if self.settings.sequential:
            fill(self.network, {slot: quantizer})
        else:
            self.pending[slot] = quantizer

    def _finish(self, name: str, weight_quantizer: Quantizer) -> None:
        self._fill((name, "weight_quantizer"), weight_quantizer)
        self.advance(name)


def _hook(
    fit: Callable[[str, Any, Tensor], Tensor], name: str
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        with full_precision(args[0].device):
            return (fit(name, layer, args[0]), *args[1:])

    return hook


def check_finite(x: Tensor, name: str) -> None:
    """Raise an error on all ranks if the input of a module is NaN or infinite on any of them."""
    bad = all_reduce_sum((~x.isfinite()).sum())
    if int(bad):
        raise QuantizationError(
            f"{int(bad)} values that go into {name} are NaN or infinite, so no range can be fitted. Check the images"
            " and the weights of the layers before it; with 16-mixed precision try bf16-mixed or 32-true."
        )
