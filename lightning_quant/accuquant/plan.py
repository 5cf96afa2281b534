"""Plan of a denoiser's quantization, made by calling it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_quant.accuquant.settings import Settings
from lightning_quant.calibration.settings import common_value
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.nn.attention import attention_form
from lightning_quant.nn.attention_mixin import SLOTS
from lightning_quant.nn.forms import obstacle
from lightning_quant.nn.layers import LAYERS
from lightning_quant.nn.selection import check_patterns, matches
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.utilities.table import Tabled

FIRST_AND_LAST = "first or last"
SOFTMAX = "softmax_quantizer"


@dataclass(frozen=True)
class PlannedModule:
    """Row of a plan: a layer, or an attention, whose weight bits are 0.

    Attributes:
        name: Name of the module.
        kind: Kind of the module.
        weight_bits: Bit-width of the weight.
        activation_bits: Bit-width of a layer's input, or of an attention's query, key and value.
        parts: Channels of each part of the input if it is a concatenation, else ().
        note: Reason for a different bit-width or for staying in float.
        left_out: Whether the module stays in float.
    """

    name: str
    kind: Literal["layer", "attention"]
    weight_bits: int
    activation_bits: int
    parts: tuple[int, ...] = ()
    note: str = ""
    left_out: bool = False


@dataclass(frozen=True)
class DenoiserPlan(Tabled):
    """Plan of a denoiser's quantized layers and attentions, in the order of their calls."""

    heads: ClassVar[tuple[str, ...]] = ("module", "weight", "activation", "note")

    rows: tuple[PlannedModule, ...]
    settings: Settings

    def chosen(self, kind: str) -> list[PlannedModule]:
        """Return the rows of a kind that are quantized."""
        return [row for row in self.rows if row.kind == kind and not row.left_out]

    def summary(self) -> str:
        """Summarize the plan in one line."""
        layers, attentions = self.chosen("layer"), self.chosen("attention")
        eight = sum(bool(row.note) for row in layers)
        split = sum(bool(row.parts) for row in layers)
        s = self.settings
        left = [row.name for row in self.rows if row.left_out]
        parts = [
            f"AccuQuant: {len(layers)} layers to W{s.weight_bits}A{s.activation_bits} ({eight} of them, first and"
            f" last, to {s.first_and_last_bits} bits)",
            f"{len(attentions)} attentions (softmax {s.softmax_bits} bits)",
            f"{split} layers with one range per half of a skip connection" if split else "",
            f"{len(left)} left in float: {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}" if left else "",
        ]
        return "; ".join(filter(None, parts)) + "."

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Yield a row of cells for each layer and attention."""
        for row in self.rows:
            bits = ("float", "float") if row.left_out else (str(row.weight_bits or ""), str(row.activation_bits))
            halves = f"halves of {' + '.join(map(str, row.parts))} channels" if row.parts else ""
            yield row.name, *bits, ", ".join(filter(None, (row.note, halves)))


def plan_denoiser(network: nn.Module, settings: Settings, run: Callable[[], object]) -> DenoiserPlan:
    """Plan the quantization from one call of the denoiser, which shows its layers and their concatenated inputs.

    Args:
        network: Network in float.
        settings: Bit-widths, and the modules to exclude.
        run: Function that calls the network on one image.

    Raises:
        UnsupportedModelError: Network without layers that can be quantized.
        ConfigurationError: Pattern in ``exclude`` that matches nothing, or patterns that match everything.
    """
    calls = _Probe(network).calls(run)
    names = {name: child for name, child in network.named_modules() if _is_layer(child) or _is_attention(child)}
    layers = [name for name in calls if _is_layer(names[name]) and not obstacle(names[name])]
    if not layers:
        raise UnsupportedModelError(
            f"{type(network).__name__} called none of the layers that can be quantized"
            f" ({', '.join(kind.__name__ for kind in LAYERS)}): give the denoiser itself, for example denoiser='unet'."
        )
    excluded = check_patterns(settings.exclude or None, "exclude", list(names)) or []
    ends = _ends(network, layers)
    order = [*calls, *(name for name in names if name not in calls)]
    rows = [
        _row(name, names[name], calls.get(name), name in ends, matches(name, excluded), settings)
        for name in order
        if name in names
    ]
    if not any(not row.left_out for row in rows):
        raise ConfigurationError(f"exclude={list(settings.exclude)} leaves nothing to quantize: write fewer patterns.")
    return DenoiserPlan(tuple(rows), settings)


def compared(module: nn.Module, settings: Settings) -> Iterator[tuple[str, object, object]]:
    """Compare the bits of the quantizers of a calibrated module with settings.

    Yields:
        Name of a setting, its value in the module, and its value in the settings.
    """
    slots = [(name.rpartition(".")[2], quantizer.bits) for name, quantizer in quantizers_of(module)]
    groups = {
        "weight_bits": ("weight_quantizer",),
        "activation_bits": ("input_quantizer", *(slot for slot in SLOTS if slot != SOFTMAX)),
        "softmax_bits": (SOFTMAX,),
    }
    for name, kinds in groups.items():
        bits = [width for slot, width in slots if slot in kinds]
        expected = getattr(settings, name)
        if name != "softmax_bits":
            # Of the first and the last layer, which may be the only ones.
            others = [width for width in bits if width != settings.first_and_last_bits]
            bits = others if others or len(bits) <= 2 else bits
        yield name, common_value(set(bits), expected), expected


def _row(
    name: str, module: nn.Module, parts: tuple[int, ...] | None, end: bool, excluded: bool, settings: Settings
) -> PlannedModule:
    if _is_attention(module):
        note, left_out = "excluded" if excluded else "not called" * (parts is None), excluded or parts is None
        return PlannedModule(name, "attention", 0, settings.activation_bits, note=note, left_out=left_out)
    bits = (settings.first_and_last_bits,) * 2 if end else (settings.weight_bits, settings.activation_bits)
    reason = "excluded" if excluded else "not called" if parts is None else obstacle(module)
    note = reason or (FIRST_AND_LAST if end else "")
    return PlannedModule(name, "layer", *bits, parts or (), note, left_out=bool(reason))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, tuple(LAYERS))


def _is_attention(module: nn.Module) -> bool:
    return attention_form(type(module)) is not None


def _ends(network: nn.Module, layers: Sequence[str]) -> set[str]:
    """Return the layer that takes in the sample, the first convolution if there is one, and the last layer."""
    convolutions = (name for name in layers if not isinstance(network.get_submodule(name), nn.Linear))
    return {next(convolutions, layers[0]), layers[-1]}


class _Probe(TorchFunctionMode):
    """Recorder of the calls of layers and attentions, and of inputs concatenated along the channels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.found: dict[str, tuple[int, ...]] = {}
        self.halves: dict[str, tuple[int, ...]] = {}
        # Holds the tensors themselves, as the id of a freed tensor could be reused.
        self.joined: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def calls(self, run: Callable[[], object]) -> dict[str, tuple[int, ...]]:
        """Return the names in order of the calls, each with the channels of its input's parts, () for a whole input."""
        hooks = []
        for name, module in self.network.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: self._called(name, m, args)))
        try:
            with torch.no_grad(), self:
                run()
        finally:
            for hook in hooks:
                hook.remove()
        self.joined.clear()
        return self.found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate) and isinstance(result, Tensor):
            tensors, dim = args[0] if args else kwargs["tensors"], kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim == 1 and result.dim() == 4:
                self.joined[id(result)] = (result, tuple(t.shape[1] for t in tensors))
        return result

    def _called(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        parts = self.joined[id(args[0])][1] if args and id(args[0]) in self.joined else ()
        if _is_layer(module) or _is_attention(module):
            parts = self.halves.get(name, parts)
            self.found[name] = () if isinstance(module, nn.Linear) else parts
        elif parts and type(module).__name__ == "ResnetBlock2D":
            # Its normalization and SiLU come first, which keep the channels of the halves.
            self.halves[f"{name}.conv1"] = parts
