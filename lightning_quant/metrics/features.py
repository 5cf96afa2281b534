"""Networks whose features stand for images: those of torch-fidelity, those of timm, and any module."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError, UnavailableError
from lightning_quant.utilities.paths import user_path

INCEPTION = "inception-v3-compat"
TIMM = "timm:"
# Of the 192 channels of 17 x 17 positions: 2023 numbers, about as many as the pooled features have (ADM's evaluator).
SPATIAL_CHANNELS = 7


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as they would be written to a file: uint8, rounded to the nearest level.

    Example:
        >>> to_bytes(torch.tensor([0.0, 0.4999, 1.0])).tolist()
        [0, 127, 255]
    """
    return (images * 255).round().to(torch.uint8)


class RegisteredFeatures(nn.Module):
    """Features of an extractor that torch-fidelity knows by name.

    Args:
        name: under which it is registered; ``timm:NAME`` registers the classifier NAME of timm.
        weights_path: local file of its weights; None: it fetches its own.

    Raises:
        ConfigurationError: no such name, or no such file.
        CheckpointError: a file that holds other weights.
        UnavailableError: its own weights cannot be had.
    """

    def __init__(self, name: str, weights_path: str | Path | None = None) -> None:
        super().__init__()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
        from torch_fidelity.utils import create_feature_extractor

        if name.startswith(TIMM):
            from lightning_quant.metrics.timm_features import register_timm

            register_timm(name)
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(f"'{other}'" for other in FEATURE_EXTRACTORS_REGISTRY)
            raise ConfigurationError(
                f"features='{name}' is no registered feature extractor: write one of 'inception', 'timm:NAME', {known},"
                " register yours with torch_fidelity.register_feature_extractor, or give a module."
            )
        layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric
        self.pooled: str = layer("fid")
        # Extractors without a classifier name some other features here: a score of those means nothing.
        self.logits: str | None = layer("isc") if "logits" in layer("isc") else None
        layers = [self.pooled, *([self.logits] if self.logits else [])]
        self.extractor: nn.Module = with_weights(
            f"features '{name}'",
            weights_path,
            lambda path: create_feature_extractor(
                name, layers, cuda=False, verbose=False, feature_extractor_weights_path=path
            ),
        )
        self._seen: list[Tensor] = []
        if name == INCEPTION:
            self.extractor.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._seen.append(output[:, :SPATIAL_CHANNELS].flatten(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Of images (n, 3, H, W) in [0, 1], as 8-bit images: rows under ``pooled``, ``logits`` and ``spatial``."""
        self._seen.clear()
        found = dict(zip(self.extractor.features_list, self.extractor(to_bytes(images)), strict=True))  # type: ignore[arg-type]
        rows = {"pooled": found[self.pooled]}
        if self.logits:
            rows["logits"] = found[self.logits]
        if self._seen:
            rows["spatial"] = self._seen.pop()
        return rows


class ModuleFeatures(nn.Module):
    """Features of any module, of which a copy in evaluation mode is kept.

    Args:
        module: images (n, 3, H, W) in [0, 1] to features (n, D), or to a pair of these and class logits (n, K).

    Example:
        >>> rows = ModuleFeatures(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)))(torch.rand(2, 3, 4, 4))
        >>> {name: tuple(row.shape) for name, row in rows.items()}
        {'pooled': (2, 5)}
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(module).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Rows under ``pooled``, and ``logits`` where the module has them."""
        found = self.module(images)
        rows = dict(zip(("pooled", "logits"), (found,) if isinstance(found, Tensor) else found, strict=False))
        for name, row in rows.items():
            if row.ndim != 2 or len(row) != len(images):
                raise ConfigurationError(
                    f"{type(self.module).__name__} gave {name} {tuple(row.shape)} for {len(images)} images: expected"
                    f" ({len(images)}, D); flatten or pool them."
                )
        return rows


def feature_network(features: str | nn.Module, weights_path: str | Path | None = None) -> nn.Module:
    """The network whose features stand for images.

    Args:
        features: ``inception`` (torch-fidelity's, that of the published numbers), another name that torch-fidelity
            knows, ``timm:NAME`` or a module, see :class:`ModuleFeatures`.
        weights_path: local file of the weights of a named one; None: it fetches its own.

    Returns:
        Module from images (n, 3, H, W) in [0, 1] to float rows of each image: ``pooled`` (n, D) and, where it has
        them, ``logits`` (n, K) and ``spatial`` (n, D').

    Raises:
        ConfigurationError: see :class:`RegisteredFeatures`; or a module with ``weights_path``.
    """
    if isinstance(features, nn.Module):
        if weights_path is not None:
            raise ConfigurationError(
                f"weights_path='{weights_path}' beside a module, {type(features).__name__}: load them into it first."
            )
        return ModuleFeatures(features)
    return RegisteredFeatures(INCEPTION if features == "inception" else features, weights_path)


def rows_of(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Features on the CPU, computed in float32 whatever autocast is on.

    Raises:
        QuantizationError: features that are not finite.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        rows = network.to(images.device)(images.float())
    for name, row in rows.items():
        if not row.isfinite().all():
            raise QuantizationError(f"The {name} features of an image are not finite: the feature network overflows.")
    return {name: row.float().cpu() for name, row in rows.items()}


def with_weights(what: str, path: str | Path | None, build: Callable[[str | None], Any]) -> Any:
    """``build(path)``, its failures told apart.

    Raises:
        ConfigurationError: there is no such file.
        CheckpointError: the file does not fit.
        UnavailableError: without a file, whatever a download fails with.
    """
    file = None if path is None else user_path(path)
    if file is not None and not file.is_file():
        raise ConfigurationError(f"The weights of {what}: there is no file '{file}'.")
    try:
        return build(None if file is None else str(file))
    except Exception as error:
        if path is None:
            # Each library downloads with another client, each with errors of its own.
            raise UnavailableError(
                f"the weights of {what} are neither here nor can they be fetched ({_short(error)}); give a local file"
            ) from error
        raise CheckpointError(f"'{path}' does not hold the weights of {what}: {_short(error)}") from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
