"""The images of a batch, told by the module itself: they are what its own step passes to its network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_quant.calibration.images import images_of
from lightning_quant.errors import ConfigurationError

_STEPS = {
    TrainerFn.TESTING: "test_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.PREDICTING: "predict_step",
    TrainerFn.FITTING: "training_step",
}
# (N, C, H, W); video and volumes have more.
_DIMENSIONS = 4


class StepImages:
    """Runs a step of a module on a batch up to the call of the network, whose input it takes.

    The step is stopped there by an exception. What it did to the module's attributes and to random numbers until then
    is undone, and what it logs is dropped.

    Args:
        trainer: Says which step comes first: that of the running verb, then the others that the module has.
        module: In the state in which its steps run.
        inside: Names of modules that are part of the network, such as its attentions.

    Attributes:
        network: Name of the module that was called with the images; empty for the LightningModule itself.

    Example:
        >>> from lightning_quant.tasks import ImageClassifier
        >>> import torch
        >>> module = ImageClassifier(model_kwargs={"in_chans": 1}).eval()
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> StepImages(trainer, module, ["network.conv1"])((torch.zeros(2, 1, 8, 8), torch.zeros(2))).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, inside: Collection[str]) -> None:
        self.trainer, self.module, self.inside = trainer, module, list(inside)
        self.network = ""
        self._told = False
        self._reasons: list[str] = []
        first = _STEPS.get(trainer.state.fn)  # type: ignore[arg-type]
        others = [step for step in _STEPS.values() if is_overridden(step, module) and step != first]
        self._steps = [*([] if first is None else [first]), *others]

    def __call__(self, batch: Any) -> Tensor:
        """The images of a batch as the module's step prepares them, ``(N, C, H, W)``.

        Where no step tells, as with batches that lack what a step needs, they are looked for in the batch itself. The
        first batch decides for all.

        Raises:
            ConfigurationError: No step tells, and there are no images where data sets commonly have them; or a step
                told of other batches and not of this one.
        """
        for step in self._steps:
            # Not within what it isolates: an exception would keep it from putting the numbers back.
            with isolate_rng():
                found = self._ask(step, batch)
            if found.images is not None:
                self._steps, self._told, self.network = [step], True, found.network
                return found.images
            self._reasons.append(f"{step} {found}")
        if self._told:
            raise ConfigurationError(
                f"Images are what {self._steps[0]} passes to the network, but for one of the batches it"
                f" {self._reasons[-1].partition(' ')[2]}. Write IGQViT(images=FUNCTION), from a batch to its images."
            )
        self._steps = []
        try:
            return images_of(batch)
        except ConfigurationError as error:
            asked = "; ".join(self._reasons) or "it has none"
            raise ConfigurationError(f"{error} The module's own steps do not tell either: {asked}.") from error

    def _ask(self, step: str, batch: Any) -> _Call:
        method = getattr(self.module, step)
        try:
            with _undone(self.module), self._watched(), self.trainer.precision_plugin.forward_context():
                method(batch, *_numbers(method))
        except _Call as call:
            return call
        except Exception as error:
            return _Call(f"raised {type(error).__name__}: {error}")
        return _Call("calls no network")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The first call of the network, or of a part of it, is an exception."""
        holders, networks = _holders(self.inside), {"", *(name.partition(".")[0] for name in self.inside)}
        handles = [
            child.register_forward_pre_hook(_stop_at(name, name in holders), with_kwargs=True)
            for name, child in self.module.named_modules()
            if name.partition(".")[0] in networks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Call(BaseException):
    """The first call of the network; not an Exception, which the user's code might catch."""

    def __init__(self, what: str, network: str = "", images: Tensor | None = None) -> None:
        super().__init__(what)
        self.network, self.images = network, images


def _holders(names: Collection[str]) -> set[str]:
    """The modules that hold the named ones, the outermost of which is the module itself."""
    parts = [name.split(".") for name in names]
    return {"", *(".".join(path[:depth]) for path in parts for depth in range(len(path)))}


def _stop_at(name: str, holds: bool) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim() >= _DIMENSIONS]
        what = f"calls {name or type(module).__name__} without images"
        raise _Call(what, name, found[0] if found and holds else None)

    return hook


@contextmanager
def _undone(module: pl.LightningModule) -> Iterator[None]:
    before = dict(vars(module))
    vars(module).update(log=_dropped, log_dict=_dropped)
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)


def _dropped(*args: Any, **kwargs: Any) -> None:
    """In the place of ``log``."""


def _numbers(step: Callable[..., Any]) -> list[int]:
    """Index of the batch and of the loader, as far as a step takes them behind the batch."""
    parameters = inspect.signature(step).parameters.values()
    if any(each.kind == each.VAR_POSITIONAL for each in parameters):
        return [0]
    return [0] * min(2, sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters) - 1)
