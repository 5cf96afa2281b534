"""A listener to the steps of optimizers, whatever wraps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_quant.gradient.optimizer import QuantizerOptimizer


class StepListener:
    """A listener that steps quantizers once for each step of the optimizer that holds their layers' weights.

    A wrapper may step an optimizer of its own within its step (sharpness-aware minimization) or have no hooks
    (lookahead), so all optimizers are listened to, and the outermost step counts. Of an optimizer that PyTorch's hooks
    never see, a step is a batch after which the weights are others.

    Args:
        quantizers: Quantizers of the layers of each optimizer.
        step: Function that steps one of them.

    Example:
        >>> import torch
        >>> from lightning_quant.gradient import LargeGradientInterval
        >>> from lightning_quant.gradient.preparation import quantize_layers
        >>> from lightning_quant.nn import Bits
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> layers = quantize_layers(network, {"0": Bits(4, 4, 4)}, LargeGradientInterval())
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> listener = StepListener([QuantizerOptimizer(layers, optimizer, lr=1e-5)], lambda ours: print("stepped"))
        >>> optimizer.step()
        stepped
        >>> listener.stop()
    """

    def __init__(self, quantizers: Sequence[QuantizerOptimizer], step: Callable[[QuantizerOptimizer], None]) -> None:
        self.quantizers, self.step = list(quantizers), step
        self._weights = [_parameters(ours.optimizer) for ours in self.quantizers]
        self._heard = [False for _ in self.quantizers]
        self._depth = [0 for _ in self.quantizers]
        self._versions = [list[int]() for _ in self.quantizers]
        self._held: WeakKeyDictionary[Optimizer, list[int]] = WeakKeyDictionary()
        self._handles = [register_optimizer_step_pre_hook(self._begins), register_optimizer_step_post_hook(self._ends)]

    def stop(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin_batch(self) -> None:
        """Remember the weights; a step that was left by an exception is over."""
        self._depth = [0 for _ in self.quantizers]
        self._versions = [
            [] if heard else _versions(weights) for heard, weights in zip(self._heard, self._weights, strict=True)
        ]

    def end_batch(self) -> None:
        """Step the quantizers of an optimizer that was never heard and has changed its weights."""
        for at, ours in enumerate(self.quantizers):
            if not self._heard[at] and self._versions[at] != _versions(self._weights[at]):
                self.step(ours)

    def _begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for at in self._holds(optimizer):
            self._depth[at] += 1

    def _ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for at in self._holds(optimizer):
            self._depth[at] -= 1
            # A gradient scaler leaves it to fused optimizers to skip a step.
            skipped = getattr(optimizer, "found_inf", None)
            if self._depth[at] <= 0 and not (isinstance(skipped, Tensor) and bool(skipped)):
                self._heard[at] = True
                self.step(self.quantizers[at])

    def _holds(self, optimizer: Optimizer) -> list[int]:
        """Which of the quantizers belong to weights that an optimizer holds."""
        if optimizer not in self._held:
            own = {id(parameter) for parameter in _parameters(optimizer)}
            found = [not own.isdisjoint(map(id, weights)) for weights in self._weights]
            self._held[optimizer] = [at for at, holds in enumerate(found) if holds]
        return self._held[optimizer]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _versions(weights: Sequence[Tensor]) -> list[int]:
    return [weight._version for weight in weights]
