"""Distances between sets of images in the space of features, computed by torch-fidelity.

Here are the choices around it: features that span less than their space are turned into their span first, which
changes no distance, and costs the cube of the images instead of the features; random subsets are those of one seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.errors import ConfigurationError, UnavailableError
from lightning_quant.utilities.paths import user_path

# Mean (D,) and covariance (D, D), as arrays of float64.
Statistics: TypeAlias = "tuple[Any, Any]"

KID_SUBSET = 1000
IS_SPLITS = 10


def frechet_distance(features: Tensor, reference: Tensor | Statistics) -> float:
    """``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` of the Gaussians with mean and covariance of two sets, in float64.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017, equation 6. Well defined for fewer
    images than features, though then larger than for many: compare it between equal numbers of images only.

    Args:
        features: (n, D).
        reference: (m, D), or mean and covariance.

    Returns:
        At least 0: what rounding leaves below is cut.

    Raises:
        UnavailableError: fewer than two images in a set.
        ConfigurationError: features of different length.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> round(frechet_distance(x, x + torch.tensor([0.0, 3.0])), 6)
        9.0
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    _check_count(2, features, *([reference] if isinstance(reference, Tensor) else []))
    width = reference.shape[1] if isinstance(reference, Tensor) else len(reference[0])
    if features.shape[1] != width:
        raise ConfigurationError(f"Features of {features.shape[1]} numbers against a reference of {width}.")
    features = features.double()
    if isinstance(reference, Tensor):
        features, reference = _in_their_span(features, reference.double())
        second = fid_features_to_statistics(reference)
    else:
        second = {"mu": reference[0], "sigma": reference[1]}
    distance = fid_statistics_to_metric(fid_features_to_statistics(features), second, verbose=False)
    return max(0.0, float(distance[KEY_METRIC_FID]))


def kernel_distance(features: Tensor, reference: Tensor, subset_size: int | None = None) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``, mean over 100 subsets (KID).

    Binkowski et al., "Demystifying MMD GANs", ICLR 2018. The subsets are those of one seed.

    Args:
        features: (n, D).
        reference: (m, D).
        subset_size: images of a subset; None: 1000, or as many as there are.

    Raises:
        UnavailableError: fewer images than a subset holds.

    Example:
        >>> x = torch.arange(12.0).reshape(4, 3)
        >>> kernel_distance(x, x + 9) > 0
        True
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KID_SUBSET, len(features), len(reference)) if subset_size is None else subset_size
    _check_count(max(size, 2), features, reference)
    found = kid_features_to_metric(features.double(), reference.double(), kid_subset_size=size, verbose=False)
    return float(found[KEY_METRIC_KID_MEAN])


def inception_score(logits: Tensor) -> float:
    """``exp E_x KL(p(y|x) | p(y))``, mean over 10 parts of the images, drawn by one seed.

    Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016. Fewer than 100 images are one part, since
    a part of few images says little of p(y).

    Args:
        logits: (n, K) of a classifier.

    Example:
        >>> round(inception_score(torch.zeros(20, 7)), 6)
        1.0
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    _check_count(1, logits)
    splits = IS_SPLITS if len(logits) >= IS_SPLITS**2 else 1
    return float(isc_features_to_metric(logits, splits=splits)[KEY_METRIC_ISC_MEAN])


def read_statistics(path: str | Path) -> dict[str, Statistics]:
    """Mean and covariance of features of real images, as the reference batches of ADM and pytorch-fid store them.

    Args:
        path: ``.npz`` with ``mu`` and ``sigma``, and maybe ``mu_s`` and ``sigma_s`` of the spatial features.

    Returns:
        Under ``pooled`` and maybe ``spatial``.

    Raises:
        ConfigurationError: no such file, or no such arrays in it.
    """
    import numpy as np

    path = user_path(path)
    if not path.is_file():
        raise ConfigurationError(f"real_statistics: there is no file '{path}'.")
    with np.load(path) as arrays:
        if missing := {"mu", "sigma"} - set(arrays):
            raise ConfigurationError(
                f"real_statistics='{path}' lacks {', '.join(sorted(missing))}: it has {', '.join(sorted(arrays))}."
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
        raise UnavailableError(f"{fewest} images, and it needs at least {needed}")


def _in_their_span(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in an orthonormal basis of all rows, where these are fewer than the columns; never one column."""
    rows = torch.cat([x, y])
    if len(rows) < x.shape[1]:
        rows = rows @ torch.linalg.qr(rows.T).Q
    if rows.shape[1] == 1:
        rows = F.pad(rows, (0, 1))
    return rows[: len(x)], rows[len(x) :]
