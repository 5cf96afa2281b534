"""Distances between sets of images in feature space, computed by torch-fidelity.

This module adds two things: features that span only a subspace are first projected onto it, which keeps all distances
and makes the cost cubic in the number of images instead of features; and random subsets use a fixed seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.errors import ConfigurationError, UnavailableError
from lightning_quant.utilities.paths import user_path

# Mean (D,) and covariance (D, D) as float64 arrays.
Statistics: TypeAlias = "tuple[Any, Any]"

KID_SUBSET = 1000
IS_SPLITS = 10


def frechet_distance(features: Tensor, reference: Tensor | Statistics) -> float:
    """Compute the Fréchet distance ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` of two sets of features in float64.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017, equation 6. The distance is
    well defined for fewer images than features, but then it is larger than for many images: compare it only between
    equal numbers of images.

    Args:
        features: Features of shape (n, D).
        reference: Features of shape (m, D), or their mean and covariance.

    Returns:
        Distance, at least 0. Negative rounding errors are clamped.

    Raises:
        UnavailableError: A set has fewer than two images.
        ConfigurationError: The features have different lengths.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> round(frechet_distance(x, x + torch.tensor([0.0, 3.0])), 6)
        9.0
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    _check_count(2, features, *([reference] if isinstance(reference, Tensor) else []))
    width = reference.shape[1] if isinstance(reference, Tensor) else len(reference[0])
    if features.shape[1] != width:
        raise ConfigurationError(f"Features have length {features.shape[1]}, but the reference has {width}.")
    features = features.double()
    if isinstance(reference, Tensor):
        features, reference = _in_their_span(features, reference.double())
        second = fid_features_to_statistics(reference)
    else:
        second = {"mu": reference[0], "sigma": reference[1]}
    distance = fid_statistics_to_metric(fid_features_to_statistics(features), second, verbose=False)
    return max(0.0, float(distance[KEY_METRIC_FID]))


def kernel_distance(features: Tensor, reference: Tensor, subset_size: int | None = None) -> float:
    """Compute the KID: the unbiased squared MMD under the kernel ``(x.y / D + 1)^3``, averaged over 100 subsets.

    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018. The subsets use a fixed seed.

    Args:
        features: Features of shape (n, D).
        reference: Features of shape (m, D).
        subset_size: Number of images in a subset. Default: 1000, or all images if there are fewer.

    Raises:
        UnavailableError: There are fewer images than a subset needs.

    Example:
        >>> x = torch.arange(12.0).reshape(4, 3)
        >>> kernel_distance(x, x + 9) > 0
        True
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KID_SUBSET, len(features), len(reference)) if subset_size is None else subset_size
    _check_count(max(size, 2), features, reference)
    distance = kid_features_to_metric(features.double(), reference.double(), kid_subset_size=size, verbose=False)
    return float(distance[KEY_METRIC_KID_MEAN])


def inception_score(logits: Tensor) -> float:
    """Compute the inception score ``exp E_x KL(p(y|x) | p(y))``, averaged over 10 random splits with a fixed seed.

    Source: Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016. Fewer than 100 images form a single
    split, since a few images give a poor estimate of p(y).

    Args:
        logits: Class logits of shape (n, K).

    Example:
        >>> round(inception_score(torch.zeros(20, 7)), 6)
        1.0
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    _check_count(1, logits)
    splits = IS_SPLITS if len(logits) >= IS_SPLITS**2 else 1
    return float(isc_features_to_metric(logits, splits=splits)[KEY_METRIC_ISC_MEAN])


def read_statistics(path: str | Path) -> dict[str, Statistics]:
    """Read mean and covariance of the features of real images, in the format of ADM and pytorch-fid.

    Args:
        path: File ``.npz`` with ``mu`` and ``sigma``, and optionally ``mu_s`` and ``sigma_s`` of the spatial features.

    Returns:
        Statistics under ``pooled`` and, if present, ``spatial``.

    Raises:
        ConfigurationError: The file does not exist or lacks these arrays.
    """
    import numpy as np

    path = user_path(path)
    if not path.is_file():
        raise ConfigurationError(f"real_statistics: file '{path}' does not exist.")
    with np.load(path) as arrays:
        if missing := {"mu", "sigma"} - set(arrays):
            raise ConfigurationError(
                f"real_statistics='{path}' lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(arrays))}."
            )
        names = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
        return {
            kind: (arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64))
            for kind, (mean, covariance) in names.items()
            if mean in arrays and covariance in arrays
        }


def _check_count(needed: int, *sets: Tensor) -> None:
    fewest = min(map(len, sets))
    if fewest < needed:
        raise UnavailableError(f"{fewest} images, but at least {needed} are needed")


def _in_their_span(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Project onto an orthonormal basis of all rows if there are fewer rows than columns. Keep at least two columns."""
    rows = torch.cat([x, y])
    if len(rows) < x.shape[1]:
        rows = rows @ torch.linalg.qr(rows.T).Q
    if rows.shape[1] == 1:
        rows = F.pad(rows, (0, 1))
    return rows[: len(x)], rows[len(x) :]
