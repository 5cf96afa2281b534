"""First ranges: of weights by least square error, of activations from histograms over float trajectories."""

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
# Shares of the widest range that are tried for each end.
_SHARES = 40
Slot = tuple[str, str]


def prepare(network: nn.Module, plan: DenoiserPlan, starts: Sequence[int] = ()) -> None:
    """Put quantizers without ranges into all slots of a float network: it computes what it did.

    Args:
        network: in float.
        plan: of it.
        starts: first timestep of each group of activation ranges; () for one range for all.
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
    """Give the weights of all quantized layers their ranges, of least square error, and nearest codes.

    Raises:
        QuantizationError: a weight that is 0 or not finite.
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
    """The quantizers of activations by name of their module and slot."""
    modules = ((("input_quantizer",), quantized_layers(network)), (SLOTS, swapped_attentions(network)))
    found = {(name, slot): getattr(m, slot) for slots, named in modules for name, m in named for slot in slots}
    return {key: quantizer for key, quantizer in found.items() if isinstance(quantizer, TimestepQuantizer)}


def activation_ranges(network: nn.Module, calls: Iterable[Callable[[], object]]) -> None:
    """Give all activations their ranges: of least square error over what the float network meets.

    Two passes, for the ends and for a histogram between them, so that ranks and order make no difference.

    Args:
        network: prepared, its activations without ranges.
        calls: each calls the network once, with its timestep; gone through twice.

    Raises:
        QuantizationError: an activation that is not finite; a group of timesteps in which a layer was not called.
    """
    statistics = {slot: _Statistics(quantizer) for slot, quantizer in activation_quantizers(network).items()}
    _watch(network, {slot: s.widen for slot, s in statistics.items()}, calls)
    _reduce(all_reduce_max, [t for s in statistics.values() for t in (s.low, s.high)])
    for (name, slot), found in statistics.items():
        found.check(f"{slot} of {name}")
    _watch(network, {slot: s.count for slot, s in statistics.items()}, calls)
    _reduce(all_reduce_sum, [s.counts for s in statistics.values()])
    for found in statistics.values():
        found.quantizer.set_range(*found.best_ranges())


def _reduce(over_ranks: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> None:
    """One collective for all tensors, in place."""
    flat = over_ranks(torch.cat([t.flatten() for t in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _watch(
    network: nn.Module, observers: dict[Slot, Callable[[Tensor], None]], calls: Iterable[Callable[[], object]]
) -> None:
    """Make the calls, and show each observer the tensors that come to its slot."""
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
    """What one slot meets: ends and histograms, each (groups, parts, ...)."""

    def __init__(self, quantizer: TimestepQuantizer) -> None:
        self.quantizer = quantizer
        device = quantizer.scale.device
        # The low end with its sign turned, so that both are maxima.
        self.low, self.high = (torch.full(quantizer.scale.shape, -torch.inf, device=device) for _ in range(2))
        self.counts = torch.zeros(*quantizer.scale.shape, BINS, device=device, dtype=torch.float64)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.float().split(self.quantizer.parts, 1) if self.quantizer.parts else (x.float(),)

    def widen(self, x: Tensor) -> None:
        """Take in the ends of a tensor."""
        group = self.quantizer.known_group
        for part, values in enumerate(self._parts(x)):
            low, high = values.aminmax()
            self.low[group, part] = torch.maximum(self.low[group, part], -low)
            self.high[group, part] = torch.maximum(self.high[group, part], high)

    def check(self, name: str) -> None:
        """Raise where there is nothing, or something that is not finite."""
        if bool((self.low.isfinite() & self.high.isfinite()).all()):
            # Zero is a code of every range.
            self.low, self.high = -self.low.clamp_min(0), self.high.clamp_min(0)
            return
        if bool(self.low.isneginf().any()):
            raise QuantizationError(
                f"The {name} met nothing in some group of timesteps: give more trajectories, or shared ranges,"
                " activation_parameters='shared'."
            )
        raise QuantizationError(
            f"The {name} met NaN or infinity: the float model overflows; run it in FP32, precision='32-true', or leave"
            " the module out with exclude."
        )

    def count(self, x: Tensor) -> None:
        """Take a tensor into the histogram between the ends."""
        group = self.quantizer.known_group
        for part, values in enumerate(self._parts(x)):
            low, high = self.low[group, part], self.high[group, part]
            bins = ((values.flatten() - low) * (BINS / (high - low).clamp_min(1e-30))).long().clamp_(0, BINS - 1)
            self.counts[group, part] += torch.bincount(bins, minlength=BINS)

    def best_ranges(self) -> tuple[Tensor, Tensor]:
        """Ranges (groups, parts) of least square error, one end searched after the other."""
        found = [
            _best_range(self.low[index], self.high[index], self.counts[index], self.quantizer.bits)
            for index in itertools.product(*map(range, self.low.shape))
        ]
        low, high = (torch.stack(ends).view_as(self.low) for ends in zip(*found, strict=True))
        return low, high


def _best_range(low: Tensor, high: Tensor, counts: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    width = (high - low) / BINS
    centres = low + width * (torch.arange(BINS, device=low.device) + 0.5)
    shares = torch.linspace(1, 1 / _SHARES, _SHARES, device=low.device)
    one = torch.ones(1, device=low.device)
    best = [one, one]
    for end in (1, 0, 1):
        tried = [best[0].expand(_SHARES), best[1].expand(_SHARES)]
        tried[end] = shares
        scale, zero_point, grid = scale_and_zero_point(low * tried[0], high * tried[1], bits, symmetric=False)
        assert zero_point is not None
        scale, zero_point = scale[:, None], zero_point[:, None]
        moved = decode(encode(centres.expand(_SHARES, -1), scale, grid, zero_point), scale, zero_point)
        error = ((moved - centres).double().square() * counts).sum(1)
        best[end] = shares[error.argmin()].view(1)
    return low * best[0][0], high * best[1][0]
