"""What a validation or a test logs with the quantized network, and with the float one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_quant.analysis import trained_quantized
from lightning_quant.calibration.module import CalibratingModule
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.nn.structure import in_float, is_quantized
from lightning_quant.utilities.paths import user_path
from lightning_quant.utilities.table import Tabled

Verb = Literal["validate", "test"]


@dataclass(frozen=True)
class Comparison(Tabled):
    """Metrics of the float and of the quantized network, side by side. Prints as a table.

    Attributes:
        metrics: Float and quantized value by the name that the module logs.

    Example:
        >>> print(Comparison({"test/acc": (0.975, 0.95)}))
         metric    float  quantized  difference
         test/acc  0.975  0.95       -0.025
        1 metric, in float and quantized.
    """

    heads: ClassVar[tuple[str, ...]] = ("metric", "float", "quantized", "difference")

    metrics: Mapping[str, tuple[float, float]]

    def cells(self) -> Iterable[tuple[str, ...]]:
        """A row for each metric."""
        for name, (plain, quantized) in self.metrics.items():
            yield name, f"{plain:.4g}", f"{quantized:.4g}", f"{quantized - plain:+.4g}"

    def summary(self) -> str:
        """One sentence."""
        return f"{len(self.metrics)} metric{'s' * (len(self.metrics) != 1)}, in float and quantized."


def compare(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    quantized: Sequence[Mapping[str, float]],
    verb: Verb = "test",
    float_ckpt_path: str | None = None,
    **data: Any,
) -> Comparison:
    """Evaluate in float what a trainer has evaluated quantized.

    Args:
        trainer: Trainer of the quantized evaluation.
        module: Module in its quantized form.
        quantized: What ``trainer.validate`` or ``trainer.test`` returned.
        verb: Evaluation to repeat.
        float_ckpt_path: Checkpoint of the float network; needed for one that was trained quantized.
        data: ``datamodule=`` or ``dataloaders=`` of the evaluation.

    Raises:
        ConfigurationError: A module in float, one whose own test compares, or one that was trained quantized and has no
            ``float_ckpt_path``.
        CheckpointError: A checkpoint of another network, or of a quantized one.
    """
    check_comparable(module, float_ckpt_path)
    found = float_metrics(trainer, module, verb, float_ckpt_path, **data)
    metrics = {name: value for each in quantized for name, value in each.items()}
    return Comparison({name: (found[name], float(value)) for name, value in metrics.items() if name in found})


def check_comparable(module: pl.LightningModule, float_ckpt_path: str | None = None) -> None:
    """Refuse to evaluate in float what has no float form; see :func:`compare`."""
    name = type(module).__name__
    if not is_quantized(module):
        raise ConfigurationError(
            f"{name} is in float, and there is nothing to compare: write --quantization IGQViT, or another method, or"
            " --ckpt_path of a quantized run."
        )
    if isinstance(module, CalibratingModule) and module.own_batches:
        raise ConfigurationError(f"The test of {name} compares with the float network already: leave it out.")
    if float_ckpt_path is None and trained_quantized(module):
        raise ConfigurationError(
            f"{name} was trained with its quantizers, and its weights without them are no float network: name the"
            " checkpoint of a float training, --float_ckpt_path FLOAT.ckpt."
        )


def float_metrics(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    verb: Verb = "test",
    float_ckpt_path: str | None = None,
    **data: Any,
) -> dict[str, float]:
    """What an evaluation logs in float; loggers and the callbacks of this package take no part."""
    with ExitStack() as stack:
        stack.enter_context(_alone(trainer))
        if isinstance(module, CalibratingModule):
            # It refuses a network without quantizers.
            stack.enter_context(_unchecked(module))
        stack.enter_context(float_network(module, module, float_ckpt_path))
        found = getattr(trainer, verb)(module, verbose=False, **data)
    return {name: value for each in found for name, value in each.items()}


class Comparable(pl.Callback):
    """Refuse, before the first batch, a network that cannot be compared with a float one; see :func:`compare`.

    Args:
        float_ckpt_path: Checkpoint of the float network; None takes the weights of the quantized one.
    """

    def __init__(self, float_ckpt_path: str | None = None) -> None:
        self.float_ckpt_path = float_ckpt_path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a checkpoint that cannot be read."""
        if self.float_ckpt_path is not None:
            read_float_state(self.float_ckpt_path)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, after the callbacks that calibrate."""
        check_comparable(pl_module, self.float_ckpt_path)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, after the callbacks that calibrate."""
        check_comparable(pl_module, self.float_ckpt_path)


@contextmanager
def float_network(module: nn.Module, network: nn.Module, float_ckpt_path: str | None = None) -> Iterator[None]:
    """Hold a network in float for a while, with the weights of a float checkpoint where one is given.

    Args:
        module: Module whose state dict the checkpoint holds.
        network: Module itself, or the part of it that is quantized.
        float_ckpt_path: Checkpoint of Lightning, or a file of tensors (.safetensors, .pth).
    """
    with in_float(network):
        if float_ckpt_path is None:
            yield
            return
        own = {key: value.clone() for key, value in module.state_dict().items()}
        try:
            _load(module, float_ckpt_path)
            yield
        finally:
            module.load_state_dict(own)


def read_float_state(path: str) -> dict[str, Tensor]:
    """State dict in a file.

    Raises:
        CheckpointError: A file that is not there, cannot be read, or is of a quantized network.
    """
    try:
        file = user_path(path)
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"float_ckpt_path={path!r} cannot be read: {type(error).__name__}: {error}") from error
    state = state.get("state_dict", state)
    if any(key.endswith("_quantizer._extra_state") for key in state):
        raise CheckpointError(
            f"float_ckpt_path={path!r} is of a quantized network: name the checkpoint of the float training."
        )
    return dict(state)


def _load(module: nn.Module, path: str) -> None:
    try:
        module.load_state_dict(read_float_state(path))
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"float_ckpt_path={path!r} is of another network: {error}") from error


@contextmanager
def _alone(trainer: pl.Trainer) -> Iterator[None]:
    """A trainer without its loggers and without callbacks of this package."""
    run: Any = trainer  # makes both elsewhere
    callbacks, loggers = run.callbacks, run.loggers
    run.callbacks, run.loggers = [each for each in callbacks if not _ours(each)], []
    try:
        yield
    finally:
        run.callbacks, run.loggers = callbacks, loggers


def _ours(callback: pl.Callback) -> bool:
    return any(base.__module__.partition(".")[0] == "lightning_quant" for base in type(callback).__mro__)


@contextmanager
def _unchecked(module: Any) -> Iterator[None]:
    module.check_calibrated = lambda: None
    try:
        yield
    finally:
        del module.check_calibrated
