"""Initial ranges: of weights by least squared error, of activations from histograms over float trajectories."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.plan import DenoiserPlan
from lightning_quant.errors import QuantizationError
from lightning_quant.functional.grid import decode, encode
from lightning_quant.functional.ranges import mse_search, scale_and_zero_point
from lightning_quant.nn.attention import SLOTS, swap_attention, swapped_attentions
from lightning_quant.nn.layers import swap
from lightning_quant.nn.structure import quantized_layers
from lightning_quant.nn.timesteps import watch_timesteps
from lightning_quant.quantizers.rounded import RoundedQuantizer
from lightning_quant.quantizers.timestep import TimestepQuantizer
from lightning_quant.utilities.distributed import all_reduce_max, all_reduce_sum

BINS = 2048
# Number of shares of the widest range that are tried for each end.
_SHARES = 40
Slot = tuple[str, str]


def prepare(network: nn.Module, plan: DenoiserPlan, starts: Sequence[int] = ()) -> None:
    """Insert quantizers without ranges into all slots of a float network; its outputs do not change.

    Args:
        network: Network in float.
        plan: Plan of the network.
        starts: First timestep of each group of activation ranges; () for one range for all timesteps.
    """
    softmax = plan.settings.softmax_bits
    for row in plan.chosen("layer"):
        estimator = partial(mse_search, bits=row.weight_bits, symmetric=False)
        weight = RoundedQuantizer(row.weight_bits, estimator=estimator)
        swap(network.get_submodule(row.name), TimestepQuantizer(row.activation_bits, starts, row.parts), weight)
    for row in plan.chosen("attention"):
        operands = {slot: TimestepQuantizer(row.activation_bits, starts) for slot in SLOTS[:3]}
        parent = network.get_submodule(row.name.rpartition(".")[0])
        attention = network.get_submodule(row.name)
        swap_attention(attention, **operands, softmax_quantizer=TimestepQuantizer(softmax, starts), parent=parent)
    watch_timesteps(network)


def weight_ranges(network: nn.Module) -> None:
    """Set the weight ranges of all quantized layers to those of least squared error, with nearest codes.

    Raises:
        QuantizationError: Weight that is all 0 or not finite.
    """
    for name, layer in quantized_layers(network):
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        quantizer.initialize(layer.weight)
        if not quantizer.ready:
            raise QuantizationError(
                f"The weight of {name!r} is all 0, infinite or NaN: leave it out with exclude=[{name!r}]."
            )


def activation_quantizers(network: nn.Module) -> dict[Slot, TimestepQuantizer]:
    """Return the quantizers of activations by module name and slot."""
    modules = ((("input_quantizer",), quantized_layers(network)), (SLOTS, swapped_attentions(network)))
    quantizers = {(name, slot): getattr(m, slot) for slots, named in modules for name, m in named for slot in slots}
    return {key: quantizer for key, quantizer in quantizers.items() if isinstance(quantizer, TimestepQuantizer)}


def activation_ranges(network: nn.Module, calls: Iterable[Callable[[], object]]) -> None:
    """Set all activation ranges to those of least squared error over the float network's activations.

    Two passes, one for the ends and one for a histogram between them, make the result independent of ranks and order.

    Args:
        network: Prepared network, its activations without ranges.
        calls: Functions that call the network once at their timestep; iterated twice.

    Raises:
        QuantizationError: Activation that is not finite, or a group of timesteps in which a layer was not called.
    """
    statistics = {slot: _Statistics(quantizer) for slot, quantizer in activation_quantizers(network).items()}
    _watch(network, {slot: s.widen for slot, s in statistics.items()}, calls)
    _reduce(all_reduce_max, [t for s in statistics.values() for t in (s.low, s.high)])
    for (name, slot), slot_statistics in statistics.items():
        slot_statistics.check(f"{slot} of {name}")
    _watch(network, {slot: s.count for slot, s in statistics.items()}, calls)
    _reduce(all_reduce_sum, [s.counts for s in statistics.values()])
    for slot_statistics in statistics.values():
        slot_statistics.quantizer.set_range(*slot_statistics.best_ranges())


def _reduce(over_ranks: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> None:
    """Reduce all tensors in place with one collective."""
    flat = over_ranks(torch.cat([t.flatten() for t in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _watch(
    network: nn.Module, observers: dict[Slot, Callable[[Tensor], None]], calls: Iterable[Callable[[], object]]
) -> None:
    """Make the calls, and pass each observer the tensors that reach its slot."""
    hooks = []
    for name, layer in quantized_layers(network):
        observe = observers[name, "input_quantizer"]
        hooks.append(layer.register_forward_pre_hook(lambda module, args, observe=observe: observe(args[0])))
    attentions = dict(swapped_attentions(network))
    for name, attention in attentions.items():
        attention.observer = lambda slot, tensor, name=name: observers[name, slot](tensor)
    try:
        with torch.no_grad():
            for call in calls:
                call()
    finally:
        for hook in hooks:
            hook.remove()
        for attention in attentions.values():
            attention.observer = None


class _Statistics:
    """Ends and histograms of the tensors at one slot, (groups, parts, ...)."""

    def __init__(self, quantizer: TimestepQuantizer) -> None:
        self.quantizer = quantizer
        device = quantizer.scale.device
        # The low end is negated, so that both ends are maxima.
        self.low, self.high = (torch.full(quantizer.scale.shape, -torch.inf, device=device) for _ in range(2))
        self.counts = torch.zeros(*quantizer.scale.shape, BINS, device=device, dtype=torch.float64)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.float().split(self.quantizer.parts, 1) if self.quantizer.parts else (x.float(),)

    def widen(self, x: Tensor) -> None:
        """Widen the ends to those of a tensor."""
        group = self.quantizer.known_group
        for part, values in enumerate(self._parts(x)):
            low, high = values.aminmax()
            self.low[group, part] = torch.maximum(self.low[group, part], -low)
            self.high[group, part] = torch.maximum(self.high[group, part], high)

    def check(self, name: str) -> None:
        """Raise an error if a group has no tensors, or a tensor is not finite."""
        if bool((self.low.isfinite() & self.high.isfinite()).all()):
            # Every range contains zero.
            self.low, self.high = -self.low.clamp_min(0), self.high.clamp_min(0)
            return
        if bool(self.low.isneginf().any()):
            raise QuantizationError(
                f"The {name} was never called in some group of timesteps: write more trajectories, or share the ranges"
                " with activation_parameters='shared'."
            )
        raise QuantizationError(
            f"The {name} got NaN or infinity: the float model overflows; run it in FP32, precision='32-true', or leave"
            " the module out with exclude."
        )

    def count(self, x: Tensor) -> None:
        """Add a tensor to the histogram between the ends."""
        group = self.quantizer.known_group
        for part, values in enumerate(self._parts(x)):
            low, high = self.low[group, part], self.high[group, part]
            bins = ((values.flatten() - low) * (BINS / (high - low).clamp_min(1e-30))).long().clamp_(0, BINS - 1)
            self.counts[group, part] += torch.bincount(bins, minlength=BINS)

    def best_ranges(self) -> tuple[Tensor, Tensor]:
        """Return the ranges (groups, parts) of least squared error, searching one end after the other."""
        ranges = [
            _best_range(self.low[index], self.high[index], self.counts[index], self.quantizer.bits)
            for index in itertools.product(*map(range, self.low.shape))
        ]
        low, high = (torch.stack(ends).view_as(self.low) for ends in zip(*ranges, strict=True))
        return low, high


def _best_range(low: Tensor, high: Tensor, counts: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    width = (high - low) / BINS
    centers = low + width * (torch.arange(BINS, device=low.device) + 0.5)
    shares = torch.linspace(1, 1 / _SHARES, _SHARES, device=low.device)
    one = torch.ones(1, device=low.device)
    best = [one, one]
    for end in (1, 0, 1):
        tried = [best[0].expand(_SHARES), best[1].expand(_SHARES)]
        tried[end] = shares
        scale, zero_point, grid = scale_and_zero_point(low * tried[0], high * tried[1], bits, symmetric=False)
        assert zero_point is not None
        scale, zero_point = scale[:, None], zero_point[:, None]
        quantized = decode(encode(centers.expand(_SHARES, -1), scale, grid, zero_point), scale, zero_point)
        error = ((quantized - centers).double().square() * counts).sum(1)
        best[end] = shares[error.argmin()].view(1)
    return low * best[0][0], high * best[1][0]
