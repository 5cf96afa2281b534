"""Which layers are quantized, with how many bits, and why the others are not: a plan, before anything changes."""

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
    """Bit-widths of weight, activation and gradient; 32 leaves a tensor in float.

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
    """One row of a plan: ``bits`` is None where the layer stays in float, for the reason in ``note``.

    ``original`` names the layer that this one copies.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: Bits | None
    note: str = ""
    original: str = ""


@dataclass(frozen=True)
class Plan(Tabled):
    """What will be quantized. Prints as a table.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> print(plan_layers(network, Bits(4, 4, 4)).summary())
        1 of 3 layers quantized to 4/4/4 bits (weight/activation/gradient), 2 left in float.
    """

    heads: ClassVar[tuple[str, ...]] = ("layer", "kind", "weight shape", "bits w/a/g", "note")

    layers: tuple[PlannedLayer, ...]

    @property
    def chosen(self) -> dict[str, Bits]:
        """Name and bit-widths of each layer that will be quantized."""
        return {layer.name: layer.bits for layer in self.layers if layer.bits is not None}

    @property
    def frozen(self) -> list[str]:
        """Names of the layers that stay in float since their network does not train."""
        return [layer.name for layer in self.layers if layer.note.startswith(FROZEN)]

    def summary(self) -> str:
        """One sentence."""
        bits = sorted({str(bits) for bits in self.chosen.values()})
        return (
            f"{len(self.chosen)} of {len(self.layers)} layers quantized to {' and '.join(bits)} bits"
            f" (weight/activation/gradient), {len(self.layers) - len(self.chosen)} left in float."
        )

    def cells(self) -> Iterator[tuple[str, ...]]:
        """A row for each layer."""
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
    """Choose the Conv, ConvTranspose and Linear layers of a module.

    Args:
        module: any module; names are those of ``module.named_modules()``.
        bits: for all layers but the first and the last.
        first_and_last: "float" leaves the first and the last chosen layer of each network (in the order of
            registration) in float, "8bit" gives them 8 bits wherever ``bits`` quantizes, "same" treats them as the
            others.
        include: Patterns as in ``fnmatch`` of the names of modules, for example ``"network.layer*"``: the module and
            all below it. None takes all.
        exclude: Patterns of the names of modules to leave in float, with all below them.
        training: Whether the layers are to be trained. Then frozen parts of a LightningModule stay in float where
            ``include`` does not name them, and copies of a network are as that is, see
            :func:`~lightning_quant.nn.networks.networks_of`.

    Raises:
        ConfigurationError: a bit-width out of range, a pattern that matches no layer.
        UnsupportedModelError: no layer to quantize; a TorchScript, uninitialised, integer or complex one.
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
            layer_bits, note = original.bits, f"as {original.name}, which it copies"
        weight = weight_of(layer)
        if layer_bits is not None:
            _check_weight(name or _kind(layer), weight)
        copied = "" if original is None else original.name
        rows[name] = PlannedLayer(name, _kind(layer), tuple(weight.shape), layer_bits, note, copied)
    plan = Plan(tuple(rows.values()))
    if not plan.chosen:
        frozen = f', or include="*" for the {len(plan.frozen)} layers that do not train as well' if plan.frozen else ""
        raise UnsupportedModelError(
            f"All {len(chosen)} layers that could be quantized are the first or the last one: write"
            f' first_and_last="8bit" or first_and_last="same" to quantize them{frozen}.'
        )
    return plan


def _ends(chosen: list[str], networks: Networks) -> dict[str, str]:
    """What to say of the first and of the last layer of each network; copies are no networks of their own."""
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
    """Name, layer, and why it cannot be quantized ("" if it can), each layer once."""
    bases = tuple(LAYERS)
    closed: dict[str, str] = {}
    for name, child in module.named_modules():
        reason = next((r for prefix, r in closed.items() if name.startswith(prefix)), "")
        if any(base.__module__.startswith("torchmetrics.") for base in type(child).__mro__):
            closed[name and f"{name}."] = "inside a metric"
        elif isinstance(child, nn.TransformerEncoderLayer) and not isinstance(child.self_attn, QuantizedAttention):
            closed[name and f"{name}."] = "TransformerEncoderLayer bypasses its linears in evaluation"
        elif isinstance(child, nn.MultiheadAttention) and not isinstance(child, QuantizedAttention):
            closed[name and f"{name}."] = "MultiheadAttention uses its weight and never calls it"
        elif isinstance(child, bases):
            yield name, child, reason or ("" if isinstance(child, QuantizedLayer) else obstacle(child))


def _reason(name: str, reason: str, include: list[str] | None, exclude: list[str] | None, frozen: str) -> str:
    if reason:
        return reason
    if include is not None and not matches(name, include):
        return "not in include"
    if exclude is not None and matches(name, exclude):
        return EXCLUDED
    return f"{FROZEN}no parameter of {frozen} trains" if frozen and include is None else ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the name of a module, or of one that holds it: the meaning of every ``exclude``.

    Example:
        >>> matches("blocks.0.attn.qkv", ["blocks.0"]), matches("blocks.0.attn.qkv", ["attn"])
        (True, False)
    """
    return any(fnmatchcase(outer, pattern) for outer in _outwards(name) for pattern in patterns)


def _outwards(name: str) -> Iterator[str]:
    """The name, and those of all modules that hold it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def check_first_and_last(first_and_last: str) -> None:
    """Raise a ConfigurationError for a policy that is not known."""
    if first_and_last not in ("float", "8bit", "same"):
        raise ConfigurationError(f'first_and_last={first_and_last!r}: expected "float", "8bit" or "same".')


def check_patterns(patterns: Patterns, argument: str, names: list[str]) -> list[str] | None:
    """The patterns as a list.

    Args:
        patterns: of an argument of the user's.
        argument: Name of that argument.
        names: Names of the layers and attentions that there are.

    Raises:
        ConfigurationError: a pattern that matches none of the names, see :func:`matches`.
    """
    if patterns is None:
        return None
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in found:
        if not any(matches(name, [pattern]) for name in names):
            modules = list(dict.fromkeys(outer for name in names for outer in _outwards(name)))
            near = difflib.get_close_matches(pattern.replace("*", ""), modules, n=4, cutoff=0.3) or names[:4]
            raise ConfigurationError(
                f"{argument}={pattern!r} matches none of the {len(names)} layers. Near it: {', '.join(near)}."
                f' Patterns are those of fnmatch on the whole name, for example {argument}="*{near[0].split(".")[-1]}".'
                if near
                else f"{argument}={pattern!r} matches nothing: the module has no Conv and no Linear."
            )
    return found


def _nothing_chosen(module: nn.Module, reasons: dict[str, str]) -> str:
    if not reasons:
        late = "; where setup or configure_model builds them, call it first" if builds_late(module) else ""
        return f"{type(module).__name__} has no Conv and no Linear layer: there is nothing to quantize{late}."
    some = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
    return f"None of the {len(reasons)} Conv and Linear layers of {type(module).__name__} is left to quantize: {some}."


def _kind(layer: nn.Module) -> str:
    kind = layer.float_class if isinstance(layer, QuantizedLayer) else type_before_parametrizations(layer)
    return kind.__name__


def _check_not_script(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or type(module).__name__} is a TorchScript module, whose layers cannot be exchanged:"
                " quantize the Python module and script it afterwards."
            )


def _check_initialized(candidates: list[tuple[str, nn.Module, str]]) -> None:
    for name, layer, _ in candidates:
        if isinstance(layer, LazyModuleMixin):
            kind = type(layer).__name__
            raise UnsupportedModelError(
                f"{name or kind} is uninitialised ({kind}): run one forward pass through the network before it is"
                " quantized."
            )


def _check_weight(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{name} has a {weight.dtype} weight, and only floating point can be quantized: leave the layer out"
            f' with exclude=["{name}"].'
        )
