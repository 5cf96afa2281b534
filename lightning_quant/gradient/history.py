"""The measures of the layers over a training, few enough to be in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_quant.gradient.quantizer import GradientQuantizer

POINTS = 256


class History:
    """Measures by step. Where there are too many, every second one is dropped, and only every second one kept further.

    Args:
        state: State of an earlier part of the training, to continue; None begins anew.
        points: Maximum number of steps that are kept. A long training keeps at least half as many.

    Example:
        >>> history = History(points=4)
        >>> for step in range(9):
        ...     history.add(step, {"gamma": 1.0})
        >>> [step for step, _ in history.rows]
        [0, 4, 8]
    """

    def __init__(self, state: Mapping[str, Any] | None = None, points: int = POINTS) -> None:
        self.points = points
        self.rows: list[tuple[int, dict[str, float]]] = []
        self._seen, self._every = 0, 1
        if state:
            self._seen, self._every = state["seen"], state["every"]
            table = zip(state["steps"], state["values"].tolist(), strict=True)
            # NaN, which nothing else is equal to, where a layer was not measured.
            self.rows = [
                (step, {name: value for name, value in zip(state["names"], values, strict=True) if value == value})
                for step, values in table
            ]

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the measures of a step."""
        if self._seen % self._every == 0:
            self.rows.append((step, dict(metrics)))
        self._seen += 1
        if len(self.rows) > self.points:
            self.rows = self.rows[::2]
            self._every *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return the history, its values as float64 (steps, names)."""
        names = list(dict.fromkeys(name for _, metrics in self.rows for name in metrics))
        table = [[metrics.get(name, float("nan")) for name in names] for _, metrics in self.rows]
        return {
            "seen": self._seen,
            "every": self._every,
            "steps": [step for step, _ in self.rows],
            "names": names,
            "values": torch.tensor(table, dtype=torch.float64).reshape(len(table), len(names)),
        }


PREFIX = "gradient_quantization"


def layer_metrics(quantizers: dict[str, GradientQuantizer]) -> dict[str, float]:
    """Collect the measures of the layers that observed a gradient, with one transfer to the host, and forget them.

    Keys are ``gradient_quantization/<layer>/<measure>`` with the measures gamma, clipped (R), target (of R), error,
    error_large (both normalized by the largest gradient) and zero (share of codes).
    """
    observed = {name: q.run.take_errors() for name, q in quantizers.items()}
    errors = {name: each for name, each in observed.items() if each is not None}
    if not errors:
        return {}
    rows = torch.stack([torch.stack([quantizers[name].gamma, *each]) for name, each in errors.items()]).tolist()
    metrics = {}
    for name, (gamma, error, error_large, clipped, zero) in zip(errors, rows, strict=True):
        values = {
            "gamma": gamma,
            "clipped": clipped,
            "target": quantizers[name].interval.target(quantizers[name].bits),
            "error": error,
            "error_large": error_large,
            "zero": zero,
        }
        metrics.update({f"{PREFIX}/{name}/{key}": value for key, value in values.items()})
    return metrics
