"""Comparison of the metrics that a validation or a test logs with the quantized and with the float network."""

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
    """Metrics of the float and the quantized network, side by side. Prints as a table.

    Attributes:
        metrics: Float and quantized value, keyed by the name that the module logs.

    Example:
        >>> print(Comparison({"test/acc": (0.975, 0.95)}))
         metric    float  quantized  difference
         test/acc  0.975  0.95       -0.025
        1 metric, in float and quantized.
    """

    heads: ClassVar[tuple[str, ...]] = ("metric", "float", "quantized", "difference")

    metrics: Mapping[str, tuple[float, float]]

    def cells(self) -> Iterable[tuple[str, ...]]:
        """Yield the cells of each metric."""
        for name, (unquantized, quantized) in self.metrics.items():
            yield name, f"{unquantized:.4g}", f"{quantized:.4g}", f"{quantized - unquantized:+.4g}"

    def summary(self) -> str:
        """Count the metrics in one sentence."""
        return f"{len(self.metrics)} metric{'s' * (len(self.metrics) != 1)}, in float and quantized."


def compare(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    quantized: Sequence[Mapping[str, float]],
    verb: Verb = "test",
    float_ckpt_path: str | None = None,
    **data: Any,
) -> Comparison:
    """Repeat in float an evaluation that a Trainer has run with the quantized network.

    Args:
        trainer: Trainer of the quantized evaluation.
        module: Quantized module.
        quantized: Metrics that ``trainer.validate`` or ``trainer.test`` returned.
        verb: Evaluation to repeat.
        float_ckpt_path: Checkpoint of the float network; required if the network was trained quantized.
        data: Data of the evaluation, as ``datamodule=`` or ``dataloaders=``.

    Raises:
        ConfigurationError: Module that is in float, whose own test already compares, or that was trained quantized and
            has no ``float_ckpt_path``.
        CheckpointError: Checkpoint of another network, or of a quantized one.
    """
    check_comparable(module, float_ckpt_path)
    reference = float_metrics(trainer, module, verb, float_ckpt_path, **data)
    metrics = {name: value for results in quantized for name, value in results.items()}
    return Comparison({name: (reference[name], float(value)) for name, value in metrics.items() if name in reference})


def check_comparable(module: pl.LightningModule, float_ckpt_path: str | None = None) -> None:
    """Raise an error if a module has no float form to evaluate, see :func:`compare`."""
    name = type(module).__name__
    if not is_quantized(module):
        raise ConfigurationError(
            f"{name} is in float, so there is nothing to compare: write --quantization IGQViT, or another method, or"
            " --ckpt_path with the checkpoint of a quantized run."
        )
    if isinstance(module, CalibratingModule) and module.own_batches:
        raise ConfigurationError(
            f"The test of {name} already compares with the float network: leave out the comparison."
        )
    if float_ckpt_path is None and trained_quantized(module):
        raise ConfigurationError(
            f"{name} was trained with its quantizers, so its weights without them are not those of a float network:"
            " write the checkpoint of a float training, --float_ckpt_path FLOAT.ckpt."
        )


def float_metrics(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    verb: Verb = "test",
    float_ckpt_path: str | None = None,
    **data: Any,
) -> dict[str, float]:
    """Run an evaluation in float and return its metrics, without loggers and callbacks of this package."""
    with ExitStack() as stack:
        stack.enter_context(_alone(trainer))
        if isinstance(module, CalibratingModule):
            # It would refuse a network without quantizers.
            stack.enter_context(_unchecked(module))
        stack.enter_context(float_network(module, module, float_ckpt_path))
        results = getattr(trainer, verb)(module, verbose=False, **data)
    return {name: value for metrics in results for name, value in metrics.items()}


class Comparable(pl.Callback):
    """Callback that refuses, before the first batch, a network without a float form, see :func:`compare`.

    Args:
        float_ckpt_path: Checkpoint of the float network; None takes the weights of the quantized network.
    """

    def __init__(self, float_ckpt_path: str | None = None) -> None:
        self.float_ckpt_path = float_ckpt_path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise an error if the float checkpoint cannot be read."""
        if self.float_ckpt_path is not None:
            read_float_state(self.float_ckpt_path)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise an error if there is no float form, after the callbacks that calibrate."""
        check_comparable(pl_module, self.float_ckpt_path)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise an error if there is no float form, after the callbacks that calibrate."""
        check_comparable(pl_module, self.float_ckpt_path)


@contextmanager
def float_network(module: nn.Module, network: nn.Module, float_ckpt_path: str | None = None) -> Iterator[None]:
    """Put a network in float within the context, with the weights of a float checkpoint if one is given.

    Args:
        module: Module whose state dict the checkpoint holds.
        network: Module itself, or the part of it that is quantized.
        float_ckpt_path: Lightning checkpoint, or a file of tensors (.safetensors, .pth).
    """
    with in_float(network):
        if float_ckpt_path is None:
            yield
            return
        original = {key: value.clone() for key, value in module.state_dict().items()}
        try:
            _load(module, float_ckpt_path)
            yield
        finally:
            module.load_state_dict(original)


def read_float_state(path: str) -> dict[str, Tensor]:
    """Read the state dict of a float network from a file.

    Raises:
        CheckpointError: File that does not exist, cannot be read, or belongs to a quantized network.
    """
    try:
        file = user_path(path)
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"float_ckpt_path={path!r} cannot be read: {type(error).__name__}: {error}") from error
    state = state.get("state_dict", state)
    if any(key.endswith("_quantizer._extra_state") for key in state):
        raise CheckpointError(
            f"float_ckpt_path={path!r} belongs to a quantized network: write the checkpoint of the float training."
        )
    return dict(state)


def _load(module: nn.Module, path: str) -> None:
    try:
        module.load_state_dict(read_float_state(path))
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"float_ckpt_path={path!r} belongs to another network: {error}") from error


@contextmanager
def _alone(trainer: pl.Trainer) -> Iterator[None]:
    """Remove loggers and callbacks of this package from a Trainer within the context."""
    run: Any = trainer  # the Trainer sets both elsewhere
    callbacks, loggers = run.callbacks, run.loggers
    run.callbacks, run.loggers = [callback for callback in callbacks if not _ours(callback)], []
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
