"""Quantizers step once for each step of an optimizer, whatever wraps it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn

from helpers.networks import SmallNet, quantization, trainer
from lightning_quant.gradient.callback import GradientQuantization


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization as people write it: two backward passes, and an optimizer of its own."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)
        self.base = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["moved"] = moved = 0.01 * parameter.grad
                    parameter.add_(moved)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter, state in self.state.items():
            parameter.sub_(state["moved"])
        self.base.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Delegating(torch.optim.Optimizer):
    """A wrapper that skips the constructor of ``Optimizer``, and with it PyTorch's hooks."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.defaults, self.state, self.param_groups = base, base.defaults, base.state, base.param_groups
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base.step(closure)


class Unheard(Delegating):
    """Steps by itself, where no hook is."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad)
        return loss


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.05)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": sgd,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.05, max_iter=2),
    "a learning rate that is a tensor": lambda params: torch.optim.Adam(params, lr=torch.tensor(1e-3)),
    "no learning rate": lambda params: create_optimizer_v2(list(params), opt="adafactor", lr=None),
    "lookahead": lambda params: create_optimizer_v2(list(params), opt="lookahead_sgd", lr=0.05),
    "sharpness with a closure": lambda params: Sharpness(list(params), lr=0.05),
    "no constructor": lambda params: Delegating(sgd(params)),
    "no hook": lambda params: Unheard(sgd(params)),
}


class Project(SmallNet):
    """Somebody's module with an optimizer of any kind."""

    def __init__(self, optimizer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = optimizer

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class ByHand(Project):
    """Two backward passes, stepped by hand."""

    def __init__(self) -> None:
        super().__init__(OPTIMIZERS["sharpness with a closure"])
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            loss: Tensor = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            step()


def fitted(module: SmallNet) -> GradientQuantization:
    callback = quantization(quantizer_lr=1e-3)
    before: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
            layer = pl_module.net[3]
            before.append(torch.stack([layer.weight_quantizer.range.detach(), layer.gradient_quantizer.gamma]))

    run = trainer(callback, Look(), max_epochs=2)
    run.fit(module)
    assert bool((before[-1] != before[0]).all())
    (ours,) = callback._optimizers
    assert ours.steps == run.fit_loop.total_batch_idx + 1
    return callback


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_step_of_any_optimizer_moves_intervals_and_ranges_once(name: str) -> None:
    fitted(Project(OPTIMIZERS[name]))


def test_a_step_that_is_made_by_hand_is_one_step() -> None:
    fitted(ByHand())


def test_nobody_listens_after_a_fit_or_an_exception() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as after
    from torch.optim.optimizer import _global_optimizer_pre_hooks as before

    def fail(params: Any) -> Any:
        class Failing(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:  # type: ignore[override]
                raise RuntimeError("stopped")

        return Failing(params, lr=0.1)

    known = len(before), len(after)
    fitted(Project(sgd))
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(quantization()).fit(Project(fail))
    assert (len(before), len(after)) == known


def test_other_networks_that_are_stepped_meanwhile_move_nothing() -> None:
    other = nn.Linear(2, 2)

    class Beside(Project):
        def on_train_batch_end(self, *arguments: Any) -> None:
            other(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(other.parameters(), lr=0.1).step()

    fitted(Beside(sgd))
