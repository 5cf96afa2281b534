"""Classifiers of timm as feature extractors for torch-fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from lightning_quant.errors import ConfigurationError

_PREFIX = "timm:"


class TimmFeatures(FeatureExtractorBase):  # type: ignore[misc]
    """Pooled features and class logits of a timm classifier, with images prepared as in its training.

    Args:
        name: Name of the extractor, ``timm:NAME``.
        features_list: Features to return, from ``pooled`` and ``logits``.
        feature_extractor_weights_path: Checkpoint that timm can read. None lets timm download it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, features_list)
        path = feature_extractor_weights_path
        self.model: Any = timm.create_model(
            name.removeprefix(_PREFIX), pretrained=path is None, checkpoint_path="" if path is None else str(path)
        )
        preparation = resolve_data_config({}, model=self.model)
        self.size: tuple[int, int] = tuple(preparation["input_size"][-2:])
        self.mode = "bilinear" if preparation["interpolation"] == "bilinear" else "bicubic"
        for statistic in ("mean", "std"):
            self.register_buffer(statistic, torch.tensor(preparation[statistic]).view(1, -1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images (n, 3, H, W), uint8."""
        x = F.interpolate(images.float() / 255, self.size, mode=self.mode, align_corners=False, antialias=True)
        x = self.model.forward_features((x.clamp(0, 1) - self.mean) / self.std)
        return tuple(self.model.forward_head(x, pre_logits=layer == "pooled") for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return True


def register_timm(name: str) -> None:
    """Register ``timm:NAME`` with torch-fidelity.

    Raises:
        ConfigurationError: The model does not exist in timm.

    Example:
        >>> register_timm("timm:tf_efficientnet_lite0")
    """
    if not timm.is_model(name.removeprefix(_PREFIX)):
        raise ConfigurationError(
            f"features='{name}': timm has no such model; timm.list_models() lists them. For example, write"
            " 'timm:tf_efficientnet_lite0'."
        )
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, TimmFeatures)
