"""Measures from rows of features and similarities, and the reasons why some of them are missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_quant.errors import UnavailableError
from lightning_quant.metrics.fidelity import Statistics, frechet_distance, inception_score, kernel_distance

Of: TypeAlias = Literal["quantized", "float"]

_NO_REAL_IMAGES = "no real images: pass real_images to update, call update_real, or set real_statistics"
_NOT_GIVEN = {
    "spatial": "this feature network has no spatial features; features='inception' has them",
    "logits": "this feature network has no class logits; a classifier such as features='inception' has them",
    "clip": "no prompts were passed to update",
}


@dataclass
class Columns:
    """Rows of all images by kind.

    Attributes:
        pairs: Rows of generated images: ``quantized.pooled``, ``float.pooled``, ..., ``psnr``.
        real: Rows of images of the data: ``pooled``, ...
        statistics: Statistics of the data, which replace its images if present.
        reasons: Reason for each kind of rows that is not available.
        notes: Remarks on the measures, for a warning.
    """

    pairs: Mapping[str, Tensor]
    real: Mapping[str, Tensor]
    statistics: Mapping[str, Statistics]
    reasons: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def of(self, of: Of, kind: str) -> Tensor:
        """Return the rows of the images of one model."""
        return self._find(self.pairs, f"{of}.{kind}", kind)

    def mean(self, kind: str, of: Of | None = None) -> float:
        """Compute the mean over the images, of one model or between both."""
        rows = self._find(self.pairs, kind, kind) if of is None else self.of(of, kind)
        return float(rows.double().mean())

    def data(self, kind: str) -> Tensor:
        """Return the rows of the images of the data."""
        if not self.real and kind not in self.reasons:
            raise UnavailableError(_NO_REAL_IMAGES)
        return self._find(self.real, kind, kind)

    def frechet(self, of: Of, kind: str, to: Literal["data", "float"]) -> float:
        """Compute the Fréchet distance of one model's images to the data or to the float model's images."""
        rows = self.of(of, kind)
        if to == "float":
            reference: Tensor | Statistics = self.of("float", kind)
        else:
            reference = self.statistics[kind] if kind in self.statistics else self.data(kind)
        if not self.notes and len(rows) <= rows.shape[1]:
            self.notes.append(
                f"Fréchet distances over {len(rows)} images with {rows.shape[1]} features are larger than over many"
                " images: compare them only between equal numbers of images."
            )
        return frechet_distance(rows, reference)

    def _find(self, columns: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
        if kind in self.reasons or name not in columns:
            raise UnavailableError(self.reasons.get(kind) or _NOT_GIVEN[kind])
        return columns[name]


def numbers(
    columns: Columns, of: Of, kid_subset_size: int | None, lpips: bool, clip: bool
) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """Compute the measures, and return their values, the reasons for missing ones, and remarks.

    Args:
        columns: Rows of all images.
        of: Model whose images are measured.
        kid_subset_size: Subset size of :func:`~lightning_quant.metrics.fidelity.kernel_distance`.
        lpips: Whether to compute LPIPS.
        clip: Whether to compute the CLIP score.
    """
    measures: dict[str, Callable[[], float]] = {
        "FID": partial(columns.frechet, of, "pooled", "data"),
        "sFID": partial(columns.frechet, of, "spatial", "data"),
        "IS": lambda: inception_score(columns.of(of, "logits")),
        "KID": lambda: kernel_distance(columns.of(of, "pooled"), columns.data("pooled"), kid_subset_size),
    }
    if clip:
        measures["CLIP"] = partial(columns.mean, "clip", of)
    if of == "quantized":
        measures["FID2FP32"] = partial(columns.frechet, of, "pooled", "float")
        measures["sFID2FP32"] = partial(columns.frechet, of, "spatial", "float")
        measures |= {kind.upper(): partial(columns.mean, kind) for kind in ("lpips", "psnr", "ssim")}
    if not lpips:
        measures.pop("LPIPS", None)
    values, missing = dict[str, float](), dict[str, str]()
    for name, measure in measures.items():
        _measure(name, measure, values, missing)
    return values, missing, columns.notes


def _measure(name: str, measure: Callable[[], float], values: dict[str, float], missing: dict[str, str]) -> None:
    try:
        values[name] = measure()
    except UnavailableError as error:
        missing[name] = str(error)
