"""Images of a batch, taken from the module itself: they are what its own step passes to its network."""

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
    """Extractor that runs a step of a module on a batch up to the call of the network, and returns its input.

    An exception stops the step there. The step's changes to the attributes of the module and to the random state are
    undone, and its logs are dropped.

    Args:
        trainer: Trainer, which decides the order of the steps to try: the one of the running verb, then the others.
        module: LightningModule in the state in which its steps run.
        inside: Names of modules that are part of the network, such as its attentions.

    Attributes:
        network: Name of the module that was called with the images. Empty for the LightningModule itself.

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
        self._decided = False
        self._reasons: list[str] = []
        first = _STEPS.get(trainer.state.fn)  # type: ignore[arg-type]
        others = [step for step in _STEPS.values() if is_overridden(step, module) and step != first]
        self._steps = [*([] if first is None else [first]), *others]

    def __call__(self, batch: Any) -> Tensor:
        """Return the images of a batch as the module's step prepares them, ``(N, C, H, W)``.

        If no step yields images, for example because the batch lacks something that it needs, they are looked up in the
        batch itself. The first batch decides for all.

        Raises:
            ConfigurationError: No step yields images, and there are none in the usual places of the batch; or a step
                yielded images for earlier batches but not for this one.
        """
        for step in self._steps:
            # The exception is caught inside, since isolate_rng does not restore the random state after one.
            with isolate_rng():
                call = self._first_call(step, batch)
            if call.images is not None:
                self._steps, self._decided, self.network = [step], True, call.network
                return call.images
            self._reasons.append(f"{step} {call}")
        if self._decided:
            raise ConfigurationError(
                f"Images are what {self._steps[0]} passes to the network, but for one of the batches it"
                f" {self._reasons[-1].partition(' ')[2]}. Write IGQViT(images=FUNCTION) with a function that returns"
                " the images of a batch."
            )
        self._steps = []
        try:
            return images_of(batch)
        except ConfigurationError as error:
            reasons = "; ".join(self._reasons) or "it has none"
            raise ConfigurationError(
                f"{error} The module's own steps do not yield images either: {reasons}."
            ) from error

    def _first_call(self, step: str, batch: Any) -> _Call:
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
        """Raise an exception at the first call of the network or of a part of it."""
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
    """First call of the network, as a BaseException, since the user's code might catch an Exception."""

    def __init__(self, what: str, network: str = "", images: Tensor | None = None) -> None:
        super().__init__(what)
        self.network, self.images = network, images


def _holders(names: Collection[str]) -> set[str]:
    """Return the names of the modules that contain the named ones, including "" for the module itself."""
    parts = [name.split(".") for name in names]
    return {"", *(".".join(path[:depth]) for path in parts for depth in range(len(path)))}


def _stop_at(name: str, holds: bool) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() >= _DIMENSIONS]
        what = f"calls {name or type(module).__name__} without images"
        raise _Call(what, name, images[0] if images and holds else None)

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
    """Replace ``log`` and ignore its arguments."""


def _numbers(step: Callable[..., Any]) -> list[int]:
    """Return the indices of the batch and the loader, as many as a step takes after the batch."""
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return [0]
    return [0] * min(2, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) - 1)
