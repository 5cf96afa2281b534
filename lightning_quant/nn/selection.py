"""Plan of a quantization: the layers to quantize with their bit-widths, and why the others stay in float."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.functional.grid import FLOAT_BITS, check_bits
from lightning_quant.nn.attention import QuantizedAttention
from lightning_quant.nn.forms import obstacle, weight_of
from lightning_quant.nn.late import builds_late
from lightning_quant.nn.layers import LAYERS, QuantizedLayer
from lightning_quant.nn.networks import Networks, networks_of
from lightning_quant.utilities.table import Tabled

FirstAndLast = Literal["float", "8bit", "same"]
Patterns = str | Sequence[str] | None
EXCLUDED = "in exclude"
FROZEN = "frozen: "


class Bits(NamedTuple):
    """Bit-widths of weight, activation and gradient; 32 keeps a tensor in float.

    Example:
        >>> str(Bits(4, 4, 32))
        '4/4/32'
    """

    weight: int
    activation: int
    gradient: int = FLOAT_BITS

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass(frozen=True)
class PlannedLayer:
    """Row of a plan. ``bits`` is None if the layer stays in float, for the reason in ``note``.

    ``original`` is the name of the layer of which this one is a copy.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: Bits | None
    note: str = ""
    original: str = ""


@dataclass(frozen=True)
class Plan(Tabled):
    """Layers of a module with their planned bit-widths. Prints as a table.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> print(plan_layers(network, Bits(4, 4, 4)).summary())
        1 of 3 layers quantized to 4/4/4 bits (weight/activation/gradient), 2 left in float.
    """

    heads: ClassVar[tuple[str, ...]] = ("layer", "kind", "weight shape", "bits w/a/g", "note")

    layers: tuple[PlannedLayer, ...]

    @property
    def chosen(self) -> dict[str, Bits]:
        """Name and bit-widths of each layer to quantize."""
        return {layer.name: layer.bits for layer in self.layers if layer.bits is not None}

    @property
    def frozen(self) -> list[str]:
        """Names of the layers that stay in float because their network is not trained."""
        return [layer.name for layer in self.layers if layer.note.startswith(FROZEN)]

    def summary(self) -> str:
        """Summarize the plan in one sentence."""
        bits = sorted({str(bits) for bits in self.chosen.values()})
        return (
            f"{len(self.chosen)} of {len(self.layers)} layers quantized to {' and '.join(bits)} bits"
            f" (weight/activation/gradient), {len(self.layers) - len(self.chosen)} left in float."
        )

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Return the table cells, one row per layer."""
        for layer in self.layers:
            bits = "float" if layer.bits is None else str(layer.bits)
            yield layer.name, layer.kind, "x".join(map(str, layer.shape)), bits, layer.note


def plan_layers(
    module: nn.Module,
    bits: Bits,
    first_and_last: FirstAndLast = "float",
    include: Patterns = None,
    exclude: Patterns = None,
    training: bool = False,
) -> Plan:
    """Choose the Conv, ConvTranspose and Linear layers of a module to quantize.

    Args:
        module: Module whose layers are chosen. Names are those of ``module.named_modules()``.
        bits: Bit-widths of all layers except the first and the last.
        first_and_last: Policy for the first and last chosen layer of each network, in the order of registration:
            "float" keeps them in float, "8bit" gives them 8 bits wherever ``bits`` quantizes, "same" treats them like
            the others.
        include: ``fnmatch`` patterns of module names, for example ``"network.layer*"``. A match includes the module
            and all its submodules. None includes all.
        exclude: ``fnmatch`` patterns of modules to keep in float with all their submodules.
        training: Whether the layers will be trained. If so, frozen parts of a LightningModule stay in float unless
            ``include`` is given, and copies of a network are treated like the original, see
            :func:`~lightning_quant.nn.networks.networks_of`.

    Raises:
        ConfigurationError: A bit-width is out of range, or a pattern matches no layer.
        UnsupportedModelError: There is no layer to quantize, or one is TorchScript, uninitialized, integer or complex.
    """
    for name, value in bits._asdict().items():
        check_bits(value, f"{name}_bits", allow_float=True)
    check_first_and_last(first_and_last)
    _check_not_script(module)
    candidates = list(_candidates(module))
    _check_initialized(candidates)
    names = [name for name, _, _ in candidates]
    include, exclude = check_patterns(include, "include", names), check_patterns(exclude, "exclude", names)
    networks = networks_of(module) if training else Networks()
    reasons = {
        name: _reason(name, reason, include, exclude, networks.frozen.get(name, "")) for name, _, reason in candidates
    }
    chosen = [name for name in names if not reasons[name]]
    if not chosen:
        raise UnsupportedModelError(_nothing_chosen(module, reasons))
    ends = _ends(chosen, networks) if first_and_last != "same" else {}
    rows: dict[str, PlannedLayer] = {}
    for name, layer, _ in candidates:
        layer_bits, note = (None, reasons[name]) if reasons[name] else (bits, "")
        if name in ends:
            note = ends[name]
            layer_bits = None if first_and_last == "float" else Bits(*(b if b == 32 else 8 for b in bits))
        original = rows.get(networks.original.get(name, ""))
        if original is not None and note != EXCLUDED:
            layer_bits, note = original.bits, f"copy of {original.name}"
        weight = weight_of(layer)
        if layer_bits is not None:
            _check_weight(name or _kind(layer), weight)
        copied = "" if original is None else original.name
        rows[name] = PlannedLayer(name, _kind(layer), tuple(weight.shape), layer_bits, note, copied)
    plan = Plan(tuple(rows.values()))
    if not plan.chosen:
        frozen = f', or include="*" to add the {len(plan.frozen)} frozen layers' if plan.frozen else ""
        raise UnsupportedModelError(
            f"All {len(chosen)} layers that could be quantized are first or last layers, which stay in float: write"
            f' first_and_last="8bit" or first_and_last="same" to quantize them{frozen}.'
        )
    return plan


def _ends(chosen: list[str], networks: Networks) -> dict[str, str]:
    """Return the notes on the first and last layer of each network. Copies do not count as networks."""
    layers: dict[str, list[str]] = {}
    for name in chosen:
        if name not in networks.original:
            layers.setdefault(networks.owner.get(name, ""), []).append(name)
    ends = {}
    for network, names in layers.items():
        of = f" of {network}" if len(layers) > 1 and network else ""
        ends.update({names[-1]: f"last layer{of}", names[0]: f"first layer{of}"})
    return ends


def _candidates(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Iterate over name, layer, and why it cannot be quantized ("" if it can), each layer once."""
    bases = tuple(LAYERS)
    closed: dict[str, str] = {}
    for name, child in module.named_modules():
        reason = next((r for prefix, r in closed.items() if name.startswith(prefix)), "")
        if any(base.__module__.startswith("torchmetrics.") for base in type(child).__mro__):
            closed[name and f"{name}."] = "inside a metric"
        elif isinstance(child, nn.TransformerEncoderLayer) and not isinstance(child.self_attn, QuantizedAttention):
            closed[name and f"{name}."] = "TransformerEncoderLayer bypasses its linears in evaluation mode"
        elif isinstance(child, nn.MultiheadAttention) and not isinstance(child, QuantizedAttention):
            closed[name and f"{name}."] = "MultiheadAttention uses its weight without calling it"
        elif isinstance(child, bases):
            yield name, child, reason or ("" if isinstance(child, QuantizedLayer) else obstacle(child))


def _reason(name: str, reason: str, include: list[str] | None, exclude: list[str] | None, frozen: str) -> str:
    if reason:
        return reason
    if include is not None and not matches(name, include):
        return "not in include"
    if exclude is not None and matches(name, exclude):
        return EXCLUDED
    return f"{FROZEN}{frozen} has no trainable parameter" if frozen and include is None else ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches the name of a module or of a module that contains it.

    All arguments named ``exclude`` work this way.

    Example:
        >>> matches("blocks.0.attn.qkv", ["blocks.0"]), matches("blocks.0.attn.qkv", ["attn"])
        (True, False)
    """
    return any(fnmatchcase(outer, pattern) for outer in _outwards(name) for pattern in patterns)


def _outwards(name: str) -> Iterator[str]:
    """Iterate over the name and those of all modules that contain it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def check_first_and_last(first_and_last: str) -> None:
    """Raise a ConfigurationError for an unknown policy."""
    if first_and_last not in ("float", "8bit", "same"):
        raise ConfigurationError(f'first_and_last={first_and_last!r}: expected "float", "8bit" or "same".')


def check_patterns(patterns: Patterns, argument: str, names: list[str]) -> list[str] | None:
    """Check the patterns and return them as a list.

    Args:
        patterns: Value of the user's argument.
        argument: Name of the argument.
        names: Names of the available layers and attentions.

    Raises:
        ConfigurationError: A pattern matches none of the names, see :func:`matches`.
    """
    if patterns is None:
        return None
    pattern_list = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in pattern_list:
        if not any(matches(name, [pattern]) for name in names):
            modules = list(dict.fromkeys(outer for name in names for outer in _outwards(name)))
            near = difflib.get_close_matches(pattern.replace("*", ""), modules, n=4, cutoff=0.3) or names[:4]
            raise ConfigurationError(
                f"{argument}={pattern!r} matches none of the {len(names)} layers. Close matches: {', '.join(near)}."
                f' Patterns are fnmatch patterns of the whole name, for example {argument}="*{near[0].split(".")[-1]}".'
                if near
                else f"{argument}={pattern!r} matches nothing: the module has no Conv and no Linear layer."
            )
    return pattern_list


def _nothing_chosen(module: nn.Module, reasons: dict[str, str]) -> str:
    if not reasons:
        late = "; if setup or configure_model creates them, call it first" if builds_late(module) else ""
        return f"{type(module).__name__} has no Conv and no Linear layer: there is nothing to quantize{late}."
    examples = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
    kind = type(module).__name__
    return f"None of the {len(reasons)} Conv and Linear layers of {kind} is left to quantize: {examples}."


def _kind(layer: nn.Module) -> str:
    kind = layer.float_class if isinstance(layer, QuantizedLayer) else type_before_parametrizations(layer)
    return kind.__name__


def _check_not_script(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or type(module).__name__} is a TorchScript module, whose layers cannot be replaced: quantize"
                " the original Python module."
            )


def _check_initialized(candidates: list[tuple[str, nn.Module, str]]) -> None:
    for name, layer, _ in candidates:
        if isinstance(layer, LazyModuleMixin):
            kind = type(layer).__name__
            raise UnsupportedModelError(
                f"{name or kind} is uninitialized ({kind}): run one forward pass through the network before you"
                " quantize it."
            )


def _check_weight(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{name} has a {weight.dtype} weight, but only floating point weights can be quantized: leave the layer out"
            f' with exclude=["{name}"].'
        )
