"""Measures of generated images: to the data, and to the images that the float model makes of the same seeds."""

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
    """Fidelity of generated images, over all ranks.

    Each image passes the feature network once. What cannot be computed, for want of weights or of real images, is
    left out of the numbers, named once in a warning and kept in :attr:`missing`; weights are fetched when the first
    images come. Several ranks give what one would: exactly so with ids.

    Args:
        features: ``inception``, another name that torch-fidelity knows, ``timm:NAME``, or a module from images
            (n, 3, H, W) in [0, 1] to features (n, D), maybe in a pair with class logits.
        weights_path: local file of the weights of named features; None: they are fetched.
        real_statistics: ``.npz`` with mean and covariance of the features of real images, in place of real images.
        kid_subset_size: images of a subset of KID; None: 1000, or as many as there are.
        lpips_net: backbone of LPIPS; None: no LPIPS.
        lpips_net_weights: local file of the backbone's weights, as torchvision publishes them; None: fetched.
        clip: name or local folder of a CLIP model of transformers, or a function that returns model and processor;
            None: no CLIP score.

    Attributes:
        missing: measure to why :meth:`compute` left it out, from its last call.

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
        self._told: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Forgets the images; the networks stay."""
        self._pairs, self._real = ImageTable(), ImageTable()
        # Why a kind of rows could not be had.
        self._reasons: dict[str, str] = {}

    def update(
        self,
        quantized_images: Tensor,
        float_images: Tensor,
        real_images: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        ids: Tensor | None = None,
    ) -> None:
        """Takes up images.

        Args:
            quantized_images: (n, C, H, W) in [0, 1], C 1 or 3; a single channel is repeated.
            float_images: same shape, of the float model from the same seeds.
            real_images: (m, C, H', W') in [0, 1], of the data.
            prompts: n texts the images were made of.
            ids: (n,) integers, see :meth:`compute`.

        Raises:
            ConfigurationError: images of another shape, type or range; prompts or ids of another number.
        """
        pair = [_color(quantized_images, "quantized_images"), _color(float_images, "float_images")]
        if quantized_images.shape != float_images.shape:
            raise ConfigurationError(
                f"quantized_images {tuple(quantized_images.shape)} and float_images {tuple(float_images.shape)}:"
                " expected the same number and size, made of the same seeds."
            )
        if prompts is not None and len(prompts) != len(quantized_images):
            raise ConfigurationError(f"{len(prompts)} prompts for {len(quantized_images)} images: give one for each.")
        if len(quantized_images):
            self._pairs.add({**self._near(*pair), **self._each(pair, prompts)}, ids)
        if real_images is not None:
            self.update_real(real_images)

    def update_real(self, images: Tensor, ids: Tensor | None = None) -> None:
        """Takes up images of the data, (m, C, H, W) in [0, 1]."""
        images = _color(images, "real_images")
        if len(images):
            self._real.add(self._rows(images), ids)

    def compute(self, of: Of = "quantized") -> dict[str, float]:
        """The numbers, the same on every rank; all ranks have to call it.

        Where ids were given, an image that came twice counts once, and the order of the images is that of the ids.

        Args:
            of: ``quantized``: FID, sFID, IS, KID and CLIP of the quantized model's images, FID2FP32, sFID2FP32,
                LPIPS, PSNR (dB, equal images as 100) and SSIM between them and the float model's. ``float``: the
                first five, of the float model's images.

        Raises:
            ConfigurationError: before any images.
        """
        everybody = gather_objects((self._pairs.joined(), self._real.joined(), self._reasons))
        values, self.missing, notes = on_first_rank(lambda: self._numbers(of, everybody))
        for note in notes:
            self._tell(note)
        if self.missing:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in self.missing.items())
            self._tell(f"Not computed: {reasons}.")
        return values

    def _numbers(
        self, of: Of, everybody: Sequence[tuple[ImageTable, ImageTable, dict[str, str]]]
    ) -> tuple[dict[str, float], dict[str, str], list[str]]:
        """On rank 0, from what all ranks have."""
        pairs, real, reasons = zip(*everybody, strict=True)
        images = merge(pairs)
        if not images:
            raise ConfigurationError("No generated images: call update before compute.")
        columns = Columns(images, merge(real), self.statistics, dict(ChainMap(*reasons)))
        clip = self.clip is not None or "clip" in columns.reasons
        return numbers(columns, of, self.kid_subset_size, lpips=self.lpips_net is not None, clip=clip)

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            rank_zero_warn(what)

    def _part(self, name: str, build: Callable[[], _T]) -> _T:
        """A network, built once; a failure is kept too, so that it is tried once only."""
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

    def _each(self, pair: Sequence[Tensor], prompts: Sequence[str] | None) -> dict[str, Tensor]:
        """What is known of the images of either model alone."""
        found: dict[str, Tensor] = {}
        for of, images in zip(("quantized", "float"), pair, strict=True):
            rows = {**self._rows(images), **self._clip(images, prompts)}
            found.update({f"{of}.{kind}": row for kind, row in rows.items()})
        return found

    def _clip(self, images: Tensor, prompts: Sequence[str] | None) -> Mapping[str, Tensor]:
        if prompts is None:
            return {}

        def rows() -> Mapping[str, Tensor]:
            clip = self.clip
            if clip is None:
                raise UnavailableError("prompts were given and no CLIP model: set clip to its name or local folder")
            model, processor = self._part("clip", lambda: clip_model(clip))
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                return {"clip": clip_scores(model, processor, images, prompts)}

        return self._tried(("clip",), rows)

    def _near(self, images: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """How near the images of both models are."""

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
    """Checked, in float32, with three channels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ConfigurationError(
            f"{name} {tuple(images.shape)} {images.dtype}: expected float images (n, 1 or 3, H, W) in [0, 1]."
        )
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise ConfigurationError(
            f"{name} from {float(images.min()):.3g} to {float(images.max()):.3g}: expected values in [0, 1];"
            " a decoder's [-1, 1] becomes that by (images / 2 + 0.5).clamp(0, 1)."
        )
    return images.float().expand(-1, 3, -1, -1)
