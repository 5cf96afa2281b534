"""Rounding up or down as a function of a variable: AdaRound, Nagel et al., arXiv 2004.10568, section 3.2."""

from __future__ import annotations

import torch
from torch import Tensor

_STRETCH, _SHIFT = 1.2, -0.1


def soft_rounding(alpha: Tensor) -> Tensor:
    """Rectified sigmoid ``clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)``: 0 rounds down, 1 up.

    >>> soft_rounding(torch.tensor([-9.0, 0.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (alpha.sigmoid() * _STRETCH + _SHIFT).clamp(0, 1)


def hard_rounding(alpha: Tensor) -> Tensor:
    """``alpha >= 0`` as 0 or 1, with the gradient of :func:`soft_rounding`.

    >>> alpha = torch.tensor([-0.1, 0.0], requires_grad=True)
    >>> hard_rounding(alpha).tolist()
    [0.0, 1.0]
    """
    soft = soft_rounding(alpha)
    hard = (alpha >= 0).to(soft.dtype)
    # Exact: soft - soft is 0, which soft + (hard - soft) need not give.
    return hard + (soft - soft.detach())


def from_fraction(fraction: Tensor) -> Tensor:
    """The variable whose soft rounding is ``fraction``, in [0, 1): 0.5 and above come out >= 0.

    >>> [round(value, 4) for value in soft_rounding(from_fraction(torch.tensor([0.0, 0.25, 0.5]))).tolist()]
    [0.0, 0.25, 0.5]
    """
    return torch.logit((fraction - _SHIFT) / _STRETCH)


def rounding_penalty(alpha: Tensor, beta: float) -> Tensor:
    """Sum of ``1 - |2 h(alpha) - 1|^beta``: pushes each rounding to 0 or 1, the harder the smaller ``beta`` (eq. 24).

    >>> float(rounding_penalty(torch.tensor([9.0, 0.0]), 2.0))
    1.0
    """
    return (1 - (2 * soft_rounding(alpha) - 1).abs().pow(beta)).sum()
