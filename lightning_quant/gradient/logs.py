"""What goes to the user's logger."""

from __future__ import annotations

import torch

from lightning_quant.gradient.quantizer import GradientQuantizer

PREFIX = "gradient_quantization"


def layer_metrics(quantizers: dict[str, GradientQuantizer]) -> dict[str, float]:
    """Measures of the layers that observed a gradient, and forget them; one transfer to the host for all.

    Keys are ``gradient_quantization/<layer>/<measure>`` with the measures gamma, clipped (R), target (of R), error,
    error_large (both normalised by the largest gradient) and zero (share of codes).
    """
    seen = {name: q for name, q in quantizers.items() if q.errors is not None}
    if not seen:
        return {}
    rows = torch.stack([torch.stack([q.gamma, *(q.errors or ())]) for q in seen.values()]).tolist()
    metrics = {}
    for (name, quantizer), (gamma, error, error_large, clipped, zero) in zip(seen.items(), rows, strict=True):
        values = {
            "gamma": gamma,
            "clipped": clipped,
            "target": quantizer.interval.target(quantizer.bits),
            "error": error,
            "error_large": error_large,
            "zero": zero,
        }
        metrics.update({f"{PREFIX}/{name}/{key}": value for key, value in values.items()})
        quantizer.errors = None
    return metrics
