"""Measures of generated images, compared with the data and with the float model's images from the same seeds."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError, UnavailableError
from lightning_quant.metrics.features import feature_network, rows_of
from lightning_quant.metrics.fidelity import Statistics, read_statistics
from lightning_quant.metrics.image_table import ImageTable, merge
from lightning_quant.metrics.measures import Columns, Of, numbers
from lightning_quant.metrics.similarity import LpipsNet, clip_model, clip_scores, lpips, lpips_network, psnr, ssim
from lightning_quant.utilities.distributed import gather_objects, on_first_rank

_T = TypeVar("_T")


class GenerationMetrics:
    """Fidelity measures of generated images, over all ranks.

    Each image passes through the feature network once. A measure that cannot be computed, because weights or real
    images are missing, is left out, named once in a warning and listed in :attr:`missing`. Weights are downloaded when
    the first images arrive. Several ranks give the same values as one: exactly the same if ids are given.

    Args:
        features: Name ``inception``, another name registered with torch-fidelity, ``timm:NAME``, or a module from
            images (n, 3, H, W) in [0, 1] to features (n, D), optionally in a pair with class logits.
        weights_path: Local file with the weights of named features. None downloads them.
        real_statistics: File ``.npz`` with mean and covariance of the features of real images, to replace real images.
        kid_subset_size: Number of images in a subset of KID. Default: 1000, or all images if there are fewer.
        lpips_net: Backbone of LPIPS. None disables LPIPS.
        lpips_net_weights: Local file with the backbone's weights as published by torchvision. None downloads them.
        clip: Name or local folder of a CLIP model for transformers, or a function that returns model and processor.
            None disables the CLIP score.

    Attributes:
        missing: Reason for each measure that the last call of :meth:`compute` left out.

    Example:
        >>> metrics = GenerationMetrics(nn.Flatten(), lpips_net=None)
        >>> images = torch.rand(4, 1, 8, 8)
        >>> metrics.update(images, images)
        >>> {name: round(value, 3) for name, value in metrics.compute().items()}
        {'FID2FP32': 0.0, 'PSNR': 100.0, 'SSIM': 1.0}
        >>> sorted(metrics.missing)
        ['FID', 'IS', 'KID', 'sFID', 'sFID2FP32']
    """

    def __init__(
        self,
        features: str | nn.Module = "inception",
        weights_path: str | Path | None = None,
        real_statistics: str | Path | None = None,
        kid_subset_size: int | None = None,
        lpips_net: LpipsNet | None = "alex",
        lpips_net_weights: str | Path | None = None,
        clip: str | Path | Callable[[], tuple[Any, Any]] | None = None,
    ) -> None:
        if kid_subset_size is not None and kid_subset_size < 2:
            raise ConfigurationError(f"kid_subset_size={kid_subset_size}: expected at least 2.")
        self.features, self.weights_path = features, weights_path
        self.lpips_net, self.lpips_net_weights, self.clip = lpips_net, lpips_net_weights, clip
        self.kid_subset_size = kid_subset_size
        self.statistics: dict[str, Statistics] = read_statistics(real_statistics) if real_statistics else {}
        self.missing: dict[str, str] = {}
        self._parts: dict[str, Any] = {}
        self._warned: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Discard the images and keep the networks."""
        self._pairs, self._real = ImageTable(), ImageTable()
        # Reason for each kind of rows that is not available.
        self._reasons: dict[str, str] = {}

    def update(
        self,
        quantized_images: Tensor,
        float_images: Tensor,
        real_images: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        ids: Tensor | None = None,
    ) -> None:
        """Add images.

        Args:
            quantized_images: Images of the quantized model, (n, C, H, W) in [0, 1], with C 1 or 3. A single channel is
                repeated.
            float_images: Images of the float model from the same seeds, same shape.
            real_images: Images of the data, (m, C, H', W') in [0, 1].
            prompts: List of n prompts from which the images were generated.
            ids: Integers of shape (n,), see :meth:`compute`.

        Raises:
            ConfigurationError: Images have another shape, type or range, or the number of prompts or ids differs.
        """
        pair = [_color(quantized_images, "quantized_images"), _color(float_images, "float_images")]
        if quantized_images.shape != float_images.shape:
            raise ConfigurationError(
                f"quantized_images have shape {tuple(quantized_images.shape)} and float_images"
                f" {tuple(float_images.shape)}: expected the same shape, from the same seeds."
            )
        if prompts is not None and len(prompts) != len(quantized_images):
            raise ConfigurationError(f"{len(prompts)} prompts for {len(quantized_images)} images: pass one per image.")
        if len(quantized_images):
            self._pairs.add({**self._similarity(*pair), **self._features(pair, prompts)}, ids)
        if real_images is not None:
            self.update_real(real_images)

    def update_real(self, images: Tensor, ids: Tensor | None = None) -> None:
        """Add images of the data, (m, C, H, W) in [0, 1]."""
        images = _color(images, "real_images")
        if len(images):
            self._real.add(self._rows(images), ids)

    def compute(self, of: Of = "quantized") -> dict[str, float]:
        """Compute the measures, which are the same on every rank. All ranks have to call this method.

        If ids were given, an image that was added twice counts once, and the images are sorted by their ids.

        Args:
            of: Model whose images are measured. ``quantized``: FID, sFID, IS, KID and CLIP of the quantized model's
                images, and FID2FP32, sFID2FP32, LPIPS, PSNR (dB, 100 for equal images) and SSIM between them and the
                float model's images. ``float``: the first five for the float model's images.

        Raises:
            ConfigurationError: No images were added.
        """
        gathered = gather_objects((self._pairs.joined(), self._real.joined(), self._reasons))
        values, self.missing, notes = on_first_rank(lambda: self._numbers(of, gathered))
        for note in notes:
            self._warn(note)
        if self.missing:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in self.missing.items())
            self._warn(f"Not computed: {reasons}.")
        return values

    def _numbers(
        self, of: Of, gathered: Sequence[tuple[ImageTable, ImageTable, dict[str, str]]]
    ) -> tuple[dict[str, float], dict[str, str], list[str]]:
        """Compute the measures on rank 0 from the tables of all ranks."""
        pairs, real, reasons = zip(*gathered, strict=True)
        images = merge(pairs)
        if not images:
            raise ConfigurationError("No generated images: call update before compute.")
        columns = Columns(images, merge(real), self.statistics, dict(ChainMap(*reasons)))
        clip = self.clip is not None or "clip" in columns.reasons
        return numbers(columns, of, self.kid_subset_size, lpips=self.lpips_net is not None, clip=clip)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)

    def _part(self, name: str, build: Callable[[], _T]) -> _T:
        """Return a network that is built once. A failure is remembered too, so that it is tried only once."""
        if name not in self._parts:
            try:
                self._parts[name] = build()
            except UnavailableError as error:
                self._parts[name] = error
        if isinstance(self._parts[name], UnavailableError):
            raise self._parts[name]
        return self._parts[name]  # type: ignore[no-any-return]

    def _tried(self, kinds: Sequence[str], rows: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        try:
            return rows()
        except UnavailableError as error:
            self._reasons.update(dict.fromkeys(kinds, str(error)))
            return {}

    def _rows(self, images: Tensor) -> Mapping[str, Tensor]:
        def rows() -> Mapping[str, Tensor]:
            network = self._part("features", lambda: feature_network(self.features, self.weights_path))
            return rows_of(network, images)

        return self._tried(("pooled", "spatial", "logits"), rows)

    def _features(self, pair: Sequence[Tensor], prompts: Sequence[str] | None) -> dict[str, Tensor]:
        """Compute the features and CLIP scores of the images of each model."""
        columns: dict[str, Tensor] = {}
        for of, images in zip(("quantized", "float"), pair, strict=True):
            rows = {**self._rows(images), **self._clip(images, prompts)}
            columns.update({f"{of}.{kind}": row for kind, row in rows.items()})
        return columns

    def _clip(self, images: Tensor, prompts: Sequence[str] | None) -> Mapping[str, Tensor]:
        if prompts is None:
            return {}

        def rows() -> Mapping[str, Tensor]:
            clip = self.clip
            if clip is None:
                raise UnavailableError("prompts were given without a CLIP model: set clip to its name or local folder")
            model, processor = self._part("clip", lambda: clip_model(clip))
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                return {"clip": clip_scores(model, processor, images, prompts)}

        return self._tried(("clip",), rows)

    def _similarity(self, images: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Compute the similarity between the images of both models."""

        def lpips_rows() -> Mapping[str, Tensor]:
            net: LpipsNet = self.lpips_net or "alex"
            network = self._part("lpips", lambda: lpips_network(net, self.lpips_net_weights))
            return {"lpips": lpips(network.to(images.device), images, reference)}

        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return {
                "psnr": psnr(images, reference),
                **self._tried(("ssim",), lambda: {"ssim": ssim(images, reference)}),
                **(self._tried(("lpips",), lpips_rows) if self.lpips_net else {}),
            }


def _color(images: Tensor, name: str) -> Tensor:
    """Check images and convert them to float32 with three channels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ConfigurationError(
            f"{name} have shape {tuple(images.shape)} and dtype {images.dtype}: expected float images"
            " (n, 1 or 3, H, W) in [0, 1]."
        )
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise ConfigurationError(
            f"{name} have values from {float(images.min()):.3g} to {float(images.max()):.3g}: expected [0, 1]; convert"
            " a decoder's output in [-1, 1] with (images / 2 + 0.5).clamp(0, 1)."
        )
    return images.float().expand(-1, 3, -1, -1)
