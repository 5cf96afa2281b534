"""Feature networks for image metrics: those of torch-fidelity and timm, and any module."""

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
# Number of the 192 channels with 17 x 17 positions to use, as in ADM's evaluator: 2,023 values, about as many as the
# pooled features have.
SPATIAL_CHANNELS = 7


def to_bytes(images: Tensor) -> Tensor:
    """Convert images in [0, 1] to uint8, rounded to the nearest level, as in an image file.

    Example:
        >>> to_bytes(torch.tensor([0.0, 0.4999, 1.0])).tolist()
        [0, 127, 255]
    """
    return (images * 255).round().to(torch.uint8)


class RegisteredFeatures(nn.Module):
    """Features of an extractor that is registered with torch-fidelity.

    Args:
        name: Registered name of the extractor. ``timm:NAME`` registers the classifier NAME of timm.
        weights_path: Local file with the weights. None downloads them.

    Raises:
        ConfigurationError: The name is not registered, or the file does not exist.
        CheckpointError: The file holds other weights.
        UnavailableError: The weights cannot be downloaded.
    """

    def __init__(self, name: str, weights_path: str | Path | None = None) -> None:
        super().__init__()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
        from torch_fidelity.utils import create_feature_extractor

        if name.startswith(TIMM):
            from lightning_quant.metrics.timm_features import register_timm

            register_timm(name)
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            registered = ", ".join(f"'{other}'" for other in FEATURE_EXTRACTORS_REGISTRY)
            raise ConfigurationError(
                f"features='{name}' is not a registered feature extractor: write one of 'inception', 'timm:NAME',"
                f" {registered}, register yours with torch_fidelity.register_feature_extractor, or pass a module."
            )
        layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric
        self.pooled: str = layer("fid")
        # Extractors without a classifier return other features here, for which a score is meaningless.
        self.logits: str | None = layer("isc") if "logits" in layer("isc") else None
        layers = [self.pooled, *([self.logits] if self.logits else [])]
        self.extractor: nn.Module = with_weights(
            f"features '{name}'",
            weights_path,
            lambda path: create_feature_extractor(
                name, layers, cuda=False, verbose=False, feature_extractor_weights_path=path
            ),
        )
        self._spatial: list[Tensor] = []
        if name == INCEPTION:
            self.extractor.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._spatial.append(output[:, :SPATIAL_CHANNELS].flatten(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute ``pooled``, ``logits`` and ``spatial`` rows of images (n, 3, H, W) in [0, 1], rounded to 8 bits."""
        self._spatial.clear()
        features = dict(zip(self.extractor.features_list, self.extractor(to_bytes(images)), strict=True))  # type: ignore[arg-type]
        rows = {"pooled": features[self.pooled]}
        if self.logits:
            rows["logits"] = features[self.logits]
        if self._spatial:
            rows["spatial"] = self._spatial.pop()
        return rows


class ModuleFeatures(nn.Module):
    """Features of any module, computed by a copy in evaluation mode.

    Args:
        module: Module from images (n, 3, H, W) in [0, 1] to features (n, D), or to a pair of features and class logits
            (n, K).

    Example:
        >>> rows = ModuleFeatures(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)))(torch.rand(2, 3, 4, 4))
        >>> {name: tuple(row.shape) for name, row in rows.items()}
        {'pooled': (2, 5)}
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(module).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the ``pooled`` features and, if the module returns them, ``logits``."""
        output = self.module(images)
        rows = dict(zip(("pooled", "logits"), (output,) if isinstance(output, Tensor) else output, strict=False))
        for name, row in rows.items():
            if row.ndim != 2 or len(row) != len(images):
                raise ConfigurationError(
                    f"{type(self.module).__name__} returned {name} of shape {tuple(row.shape)} for {len(images)}"
                    f" images, but expected ({len(images)}, D): flatten or pool them."
                )
        return rows


def feature_network(features: str | nn.Module, weights_path: str | Path | None = None) -> nn.Module:
    """Create the feature network for image metrics.

    Args:
        features: Name ``inception`` (torch-fidelity's, as in published results), another name registered with
            torch-fidelity, ``timm:NAME``, or a module, see :class:`ModuleFeatures`.
        weights_path: Local file with the weights of a named network. None downloads them.

    Returns:
        Module from images (n, 3, H, W) in [0, 1] to a dict of float rows per image: ``pooled`` (n, D) and, if
        available, ``logits`` (n, K) and ``spatial`` (n, D').

    Raises:
        ConfigurationError: ``weights_path`` is given with a module; see also :class:`RegisteredFeatures`.
    """
    if isinstance(features, nn.Module):
        if weights_path is not None:
            raise ConfigurationError(
                f"weights_path='{weights_path}' cannot be combined with a module, {type(features).__name__}: load the"
                " weights into the module first."
            )
        return ModuleFeatures(features)
    return RegisteredFeatures(INCEPTION if features == "inception" else features, weights_path)


def rows_of(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Compute features in float32, regardless of autocast, and return them on the CPU.

    Raises:
        QuantizationError: A feature is not finite.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        rows = network.to(images.device)(images.float())
    for name, row in rows.items():
        if not row.isfinite().all():
            raise QuantizationError(f"The {name} features of an image are not finite: the feature network overflows.")
    return {name: row.float().cpu() for name, row in rows.items()}


def with_weights(what: str, path: str | Path | None, build: Callable[[str | None], Any]) -> Any:
    """Return ``build(path)``, and convert its failures into errors of this package.

    Raises:
        ConfigurationError: The file does not exist.
        CheckpointError: The file holds other weights.
        UnavailableError: There is no file, and the download failed.
    """
    file = None if path is None else user_path(path)
    if file is not None and not file.is_file():
        raise ConfigurationError(f"Weights of {what}: file '{file}' does not exist.")
    try:
        return build(None if file is None else str(file))
    except Exception as error:
        if path is None:
            # Each library downloads with a different client, which has its own errors.
            raise UnavailableError(
                f"the weights of {what} are not available locally and cannot be downloaded ({_short(error)}); pass a"
                " local file"
            ) from error
        raise CheckpointError(f"'{path}' does not hold the weights of {what}: {_short(error)}") from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
