"""Plan of a calibration, printed before it starts: what is quantized, what stays in float, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lightning_quant.calibration.settings import common_value
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.igq_vit.schemes import PATCH_BITS
from lightning_quant.igq_vit.settings import Scheme, Settings
from lightning_quant.metrics.bops import LayerShape, ModelBops, fully_connected_bops, model_bops
from lightning_quant.nn import Bits, plan_layers
from lightning_quant.nn.attention import swapped_attentions
from lightning_quant.nn.attention_check import find_attentions
from lightning_quant.nn.layers import LAYERS
from lightning_quant.nn.selection import check_patterns, matches
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.dynamic import ChannelQuantizer, LogQuantizer, TokenQuantizer
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer
from lightning_quant.utilities.table import Tabled

Role = Literal["grouped", "one token", "patch", "attention", "float"]
_INPUTS = {
    "igq": "{a} bit, channels in {groups} groups per image",
    "layer_wise": "{a} bit layer-wise",
    "repq": "{a} bit layer-wise, reparameterized after LayerNorm",
    "per_token": "{a} bit per token",
    "upper_bound": "{a} bit per channel of each image",
}
_SOFTMAX = {
    "igq": "{a} bit, rows in {rows} groups",
    "layer_wise": "{a} bit layer-wise",
    "repq": "{a} bit log sqrt 2",
    "per_token": "{a} bit per row",
    "upper_bound": "{a} bit per row",
}


@dataclass(frozen=True)
class PlannedModule:
    """Row of the plan: a layer or an attention, its role in the method, and a note if it is left in float."""

    name: str
    kind: str
    role: Role
    shape: LayerShape | None
    note: str = ""


@dataclass(frozen=True)
class VitPlan(Tabled):
    """Plan for all layers and attentions of a network. Prints as a table."""

    heads: ClassVar[tuple[str, ...]] = ("module", "kind", "weight", "input or operands", "note")

    rows: tuple[PlannedModule, ...]
    settings: Settings

    def names(self, *roles: Role) -> list[str]:
        """Return the names of the modules with these roles, in the order of registration."""
        return [row.name for row in self.rows if row.role in roles]

    def shape(self, name: str) -> LayerShape:
        """Return the sizes of a module that the forward calls."""
        shape = next(row.shape for row in self.rows if row.name == name)
        assert shape is not None
        return shape

    def softmax_rows(self, name: str) -> int:
        """Count the rows of a softmax in one head, over all calibration images."""
        shape = self.shape(name)
        return shape.tokens * shape.windows * self.settings.calibration_images

    def bops(self, groups: Mapping[str, int] | int) -> ModelBops:
        """Count the bit operations per image in all quantized modules, with groups by layer or the same for all."""
        shapes = [row.shape for row in self.rows if row.shape is not None and row.role != "float"]
        return model_bops(shapes, self.settings.weight_bits, self.settings.activation_bits, groups, PATCH_BITS)

    def layer_bops(self, name: str, groups: int) -> int:
        """Count the bit operations per image in one fully connected layer."""
        shape, s = self.shape(name), self.settings
        sizes = (shape.tokens, shape.in_features, shape.out_features)
        return fully_connected_bops(*sizes, s.weight_bits, s.activation_bits, groups)

    def input_budget(self) -> int:
        """Return the part of ``settings.budget`` that is left for the grouped layers, in bit operations."""
        assert self.settings.budget is not None
        return int(self.settings.budget * 1e9) - self._rest()

    def _rest(self) -> int:
        """Count the bit operations per image in all but the grouped layers."""
        return self.bops(0).total - sum(self.layer_bops(name, 0) for name in self.names("grouped"))

    def least(self) -> int:
        """Count the bit operations per image with one group everywhere."""
        return self._rest() + sum(self.layer_bops(name, 1) for name in self.names("grouped"))

    def summary(self) -> str:
        """Summarize what is quantized."""
        layers, attentions = len(self.names("grouped", "one token", "patch")), len(self.names("attention"))
        floats = len(self.names("float"))
        return (
            f"{layers} layers and {attentions} attentions to {self.settings.weight_bits}-bit weights and"
            f" {self.settings.activation_bits}-bit activations, {floats} left in float. Norms, GELU, softmax itself,"
            " residuals, biases and position embeddings stay in float."
        )

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of each layer and attention."""
        for row in self.rows:
            weight = "" if row.role in ("attention", "float") else f"{self.settings.weight_bits} bit"
            yield row.name, row.kind, weight, self._input(row), row.note

    def _input(self, row: PlannedModule) -> str:
        s = self.settings
        words = {"a": s.activation_bits, "groups": s.groups, "rows": s.row_groups}
        match row.role:
            case "grouped":
                return _INPUTS[s.scheme].format(**words)
            case "one token":
                return f"{s.activation_bits} bit layer-wise (one token)"
            case "patch":
                return f"{PATCH_BITS} bit layer-wise"
            case "attention":
                softmax = _SOFTMAX[s.scheme].format(**words)
                return f"Q, K, V {s.activation_bits} bit layer-wise; softmax {softmax}"
            case _:
                return "float"


def plan_vit(
    network: nn.Module, shapes: Sequence[LayerShape], settings: Settings, independent: Collection[str] = ()
) -> VitPlan:
    """Assign a role to each layer and each attention.

    Args:
        network: Network with swapped attentions.
        shapes: Shapes of the layers that a forward calls, from :func:`lightning_quant.metrics.measure_shapes`.
        settings: Settings of the calibration.
        independent: Names of the layers whose input is the same for all images.

    Raises:
        UnsupportedModelError: No layer is left to quantize.
        ConfigurationError: More groups than a layer has channels or a softmax has rows, a budget below the cost of one
            group per layer, or a pattern of ``exclude`` that matches nothing.
    """
    shape_of = {shape.name: shape for shape in shapes}
    bits = Bits(settings.weight_bits, settings.activation_bits)
    opened = dict(swapped_attentions(network))
    order = [name for name, _ in network.named_modules()]
    # Including attentions that are left in float.
    first_attention = min((order.index(name) for name, _ in find_attentions(network)), default=len(order))
    rows = []
    for layer in plan_layers(network, bits, "same", exclude=_left_out(network, settings.exclude)).layers:
        shape, note = shape_of.get(layer.name), layer.note
        if not note and shape is None:
            note = "not called by the forward"
        if not note and layer.name in independent:
            note = "does not depend on the image: position bias stays in float"
        if not note and "Conv" in layer.kind and order.index(layer.name) > first_attention:
            note = "convolution after the patch embedding: not part of the method"
        rows.append(PlannedModule(layer.name, layer.kind, _role(shape, note), shape, note))
    for name in opened:
        called = name in shape_of
        role: Role = "attention" if called else "float"
        note = "" if called else "not called by the forward"
        kind = opened[name].float_class.__name__
        rows.append(PlannedModule(name, kind, role, shape_of.get(name), note))
    plan = VitPlan(tuple(sorted(rows, key=lambda row: order.index(row.name))), settings)
    if not plan.names("grouped", "one token"):
        raise UnsupportedModelError(
            f"No fully connected layer of {type(network).__name__} is left to quantize: remove patterns from exclude."
        )
    _check_groups(plan)
    if settings.budget is not None and plan.least() > settings.budget * 1e9:
        least, usual = plan.least() / 1e9, plan.bops(settings.groups).total / 1e9
        raise ConfigurationError(
            f"budget={settings.budget} giga bit operations is too small: one group in every layer already needs"
            f" {least:.4g}. Write budget={least * 1.001:.4g} or more ({settings.groups} groups everywhere need"
            f" {usual:.4g})."
        )
    return plan


def _left_out(network: nn.Module, exclude: Sequence[str]) -> list[str] | None:
    """Find the layers that the patterns leave in float; a pattern may also match attentions alone."""
    layers = [name for name, module in network.named_modules() if isinstance(module, tuple(LAYERS))]
    check_patterns(list(exclude), "exclude", [*layers, *(name for name, _ in find_attentions(network))])
    return [name for name in layers if matches(name, exclude)] or None


def _role(shape: LayerShape | None, note: str) -> Role:
    if note or shape is None:
        return "float"
    if shape.kind == "convolution":
        return "patch"
    return "grouped" if shape.tokens > 1 else "one token"


def _check_groups(plan: VitPlan) -> None:
    if plan.settings.scheme != "igq":
        return
    for name in plan.names("grouped"):
        channels = plan.shape(name).in_features
        if plan.settings.groups > channels:
            raise ConfigurationError(
                f"groups={plan.settings.groups}, but the input of {name} has {channels} channels: write"
                f" groups={channels} or less, or exclude=[{name!r}]."
            )
    for name in plan.names("attention"):
        rows = plan.softmax_rows(name)
        if plan.settings.row_groups > rows:
            raise ConfigurationError(
                f"softmax_groups={plan.settings.row_groups}, but the softmax of {name} has {rows} rows per head, over"
                f" all calibration images: write softmax_groups={rows} or less."
            )


# Scheme by quantizer class. The first class present decides, since the upper bound also has one range per row.
_SCHEME_OF: dict[type[Quantizer], Scheme] = {
    GroupQuantizer: "igq",
    RowGroupQuantizer: "igq",
    ChannelQuantizer: "upper_bound",
    TokenQuantizer: "per_token",
    LogQuantizer: "repq",
}


def compared(module: nn.Module, settings: Settings) -> Iterator[tuple[str, object, object]]:
    """Compare the quantizers of a calibrated module with settings, as far as quantizers reveal them.

    Quantizers do not reveal how their ranges were found.

    Yields:
        Name of a setting, its value in the module, and its value in the settings.
    """
    slots = [(name.rpartition(".")[2], quantizer) for name, quantizer in quantizers_of(module)]
    kinds = {type(quantizer) for _, quantizer in slots}
    scheme = next((name for kind, name in _SCHEME_OF.items() if kind in kinds), "layer_wise")
    yield "scheme", scheme, settings.scheme
    weights = {quantizer.bits for slot, quantizer in slots if slot == "weight_quantizer"}
    yield "weight_bits", common_value(weights, settings.weight_bits), settings.weight_bits
    # The patch embedding has PATCH_BITS whatever the settings.
    inputs = {quantizer.bits for slot, quantizer in slots if slot != "weight_quantizer"}
    inputs = inputs - {PATCH_BITS} or inputs
    yield "activation_bits", common_value(inputs, settings.activation_bits), settings.activation_bits
    if not settings.allocates:
        channels = {quantizer.groups for _, quantizer in slots if isinstance(quantizer, GroupQuantizer)}
        yield "groups", common_value(channels, settings.groups), settings.groups
        rows = {quantizer.groups for _, quantizer in slots if isinstance(quantizer, RowGroupQuantizer)}
        yield "softmax_groups", common_value(rows, settings.row_groups), settings.row_groups
