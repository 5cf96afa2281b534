"""Remedies for causes of error: arguments of the method that quantized the network, as a line to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_quant.analysis import Analysis, Cause, LayerAnalysis

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """Cause of an error with the figure that shows it, its remedy, and the argument to write, or an empty string."""

    cause: str
    remedy: str
    line: str = ""


class Remedy(NamedTuple):
    """Remedy in words, and the argument of the method that applies it."""

    words: str
    line: str


def in_float(name: str, settings: Settings) -> Remedy:
    """Return the remedy that leaves a layer in float, in addition to those that are already excluded.

    Example:
        >>> in_float("head", {"exclude": ["stem"]}).line
        "exclude=['stem', 'head']"
    """
    return Remedy("leave it in float", joint_line([name], settings))


def of_training(cause: Cause, layer: LayerAnalysis, settings: Settings) -> Remedy:
    """Return the remedy for a cause with arguments of ``GradientQuantization``."""
    rate = f"quantizer_lr={10 * settings.get('quantizer_lr', 1e-5):g}"
    match cause.kind:
        case "noise only":
            words = (
                "the statistics of batch norms may not have settled after a short training: train longer, or leave it"
            )
            return Remedy(f"{words} in float", in_float(layer.name, settings).line)
        case "codes below 0":
            return Remedy(
                "half of a symmetric grid is unused: start the grid at 0", f"signed={{{layer.name!r}: False}}"
            )
        case "clipped":
            return Remedy("let the range grow faster", rate)
        case "unused codes":
            return Remedy("the range is wider than the values: let it shrink faster", rate)
        case _:
            return in_float(layer.name, settings)


def of_groups(cause: Cause, layer: LayerAnalysis, settings: Settings) -> Remedy:
    """Return the remedy for a cause with arguments of ``IGQViT``."""
    more_images = Remedy(
        "calibrate on more images, similar to the test images", _doubled("calibration_images", settings, 32)
    )
    grouped = bool(layer.groups) and cause.slot in ("input", "softmax")
    match cause.kind:
        case "outlier channels" | "noisy" if grouped:
            return Remedy("divide the channels into more groups", _doubled("groups", settings, 8))
        case "outlier channels" | "noisy":
            return in_float(layer.name, settings)
        case "clipped" if grouped and settings.get("group_ranges") != "envelope":
            return Remedy("let the range of a group span all its channels", "group_ranges='envelope'")
        case "clipped" if not grouped and settings.get("layer_range") != "min_max":
            return Remedy("let the range span all values", "layer_range='min_max'")
        case "unused codes" if not grouped and settings.get("layer_range") == "min_max":
            return Remedy("clip the range where the error is smallest", "layer_range='percentile'")
        case _:
            return more_images


def of_windows(cause: Cause, layer: LayerAnalysis, settings: Settings) -> Remedy:
    """Return the remedy for a cause with arguments of ``AccuQuant``."""
    if cause.kind == "noisy" and cause.slot == "weight" and not settings.get("reconstruction"):
        return Remedy("learn the rounding block by block first", "reconstruction=100")
    if cause.kind in ("outlier channels", "noisy"):
        return in_float(layer.name, settings)
    if cause.slot != "weight" and settings.get("activation_parameters") != "per_group":
        return Remedy("use separate ranges for each part of the trajectory", "activation_parameters='per_group'")
    if cause.kind == "clipped":
        return Remedy("fit the range on more trajectories", _doubled("trajectories", settings, 256))
    return in_float(layer.name, settings)


def of_any(cause: Cause, layer: LayerAnalysis, settings: Settings) -> Remedy:
    """Return the remedy that every method has."""
    return in_float(layer.name, settings)


def effect(layer: LayerAnalysis, analysis: Analysis) -> str:
    """Describe the measured effect of leaving a layer in float; empty if it was not measured.

    For an attention it is empty, since a line that excludes one also leaves its projections in float, which was not
    measured.
    """
    if layer.only_float is None or analysis.error is None or not layer.shape:
        return ""
    return f": {analysis.error:.1%} to {layer.only_float:.1%} error of the outputs"


def joint_line(layers: Sequence[str], settings: Settings) -> str:
    """Return the line that leaves several layers in float."""
    excluded = settings.get("exclude") or []
    return f"exclude={[*([excluded] if isinstance(excluded, str) else excluded), *layers]}"


def _doubled(name: str, settings: Settings, usual: int) -> str:
    return f"{name}={2 * int(settings.get(name) or usual)}"
