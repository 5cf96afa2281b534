"""Analysis of a quantized module on its own test data, from Python and from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_quant.analysis import Analysis, trained_quantized
from lightning_quant.calibration.module import CalibratingModule
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.gradient import GradientQuantization
from lightning_quant.gradient.preparation import quantize_layers
from lightning_quant.nn.structure import is_quantized, quantized_layers, quantizers_of
from lightning_quant.report.comparing import float_metrics
from lightning_quant.report.html import with_float, worst_layers, write_report
from lightning_quant.report.quantization_report import QuantizationReport
from lightning_quant.utilities.paths import local_path

TestData: TypeAlias = pl.LightningDataModule | Iterable[Any]


def analyze(
    module: pl.LightningModule,
    datamodule: TestData | None = None,
    folder: str | Path | None = None,
    ckpt_path: str | None = None,
    sensitivity: bool = True,
    images: int = 32,
    trainer: pl.Trainer | None = None,
    float_ckpt_path: str | None = None,
) -> Analysis:
    """Test a module quantized and in float, measure it layer by layer, and write ``quantization_report.html``.

    A module with ranges is taken as it is, one of a checkpoint as that says. Otherwise the callback of a method among
    the Trainer's says how it would be quantized: IGQViT and AccuQuant calibrate; for GradientQuantization, which learns
    its ranges, they are set by the first test batch.

    Args:
        module: quantized, or to be quantized by a callback of the Trainer or by the checkpoint.
        datamodule: DataModule of the test data, one or several DataLoaders, or a list of batches; None where the module
            has its own.
        folder: for the report; None takes the logger's, without logger the trainer's ``default_root_dir``.
        ckpt_path: of a quantized run.
        sensitivity: whether layers are measured one by one.
        images: rows of batches that they are measured on at least.
        trainer: None makes one without logger and checkpoints.
        float_ckpt_path: Checkpoint of the float network to compare with. None takes the weights without their
            quantizers; a network that was trained quantized is compared with none.

    Raises:
        QuantizationError: nothing that is quantized, or could be.
        ConfigurationError: data that cannot be read twice, or is not in batches; a folder that cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_quant import DigitsDataModule, GradientQuantization, ImageClassifier
        >>> module = ImageClassifier("cifar_resnet20", 10, model_kwargs={"in_chans": 1})
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = pl.Trainer(callbacks=[GradientQuantization()], accelerator="cpu", limit_test_batches=1, **quiet)
        >>> with TemporaryDirectory() as folder:
        ...     found = analyze(module, DigitsDataModule(), folder, sensitivity=False, trainer=trainer)
        >>> len(found.layers)
        18
    """
    data = None if datamodule is None else _readable(datamodule)
    ckpt_path = None if ckpt_path is None else local_path(ckpt_path)
    run = trainer or pl.Trainer(logger=False, enable_checkpointing=False)
    report = QuantizationReport(folder, sensitivity, images, float_ckpt_path=float_ckpt_path)
    others: list[pl.Callback] = run.callbacks  # type: ignore[attr-defined]  # Trainer makes it elsewhere
    ours = next((each for each in others if isinstance(each, GradientQuantization)), None)
    planned = ours is not None and ckpt_path is None and not any(q.ready for _, q in quantizers_of(module))
    with ExitStack() as stack:
        if ours is not None and planned:
            stack.enter_context(_without(others, ours))
            if not is_quantized(module):
                quantize_layers(module, ours.plan(module).chosen, ours.interval)
            rank_zero_info("Not trained yet: ranges are those of the first test batch, as a training would begin.")
            others.append(_Start())
            report.starts_in_float = True
        others.append(report)
        try:
            run.test(module, data, ckpt_path=ckpt_path, verbose=False, **_unpickled(ckpt_path))
        finally:
            others[:] = [each for each in others if not isinstance(each, _Start)]
            others.remove(report)
    if report.report is None:
        raise QuantizationError(
            f"Nothing in {type(module).__name__} is quantized: add GradientQuantization, IGQViT or AccuQuant to the"
            " Trainer's callbacks, or give ckpt_path= of a quantized run."
        )
    plain = report.starts_in_float or not trained_quantized(module) or float_ckpt_path is not None
    if plain and not (isinstance(module, CalibratingModule) and module.own_batches):
        metrics = float_metrics(run, module, "test", float_ckpt_path, dataloaders=data)
        write_report(report.written[0].parent, with_float(report.report, metrics))
    rank_zero_info(f"{_in_short(report.report.analysis)}\nReport: {report.written[0]}")
    return report.report.analysis


def _readable(data: TestData) -> TestData:
    """What Lightning takes, and can take a second time, in float."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ConfigurationError(
            f"The test data is a {type(data).__name__}, which has no batches: give DataLoader(dataset, batch_size=32)."
        )
    if isinstance(data, Iterator) or not isinstance(data, pl.LightningDataModule | Iterable):
        raise ConfigurationError(
            f"The test data is a {type(data).__name__}, which cannot be read twice, quantized and in float: give a"
            " DataLoader, a DataModule or a list of batches."
        )
    if isinstance(data, list | tuple) and not any(isinstance(each, DataLoader) for each in data):
        # Of a list Lightning takes each element for a loader.
        batches: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
        return batches
    return data


class _Start(pl.Callback):
    """Lets quantizers begin with the first batch, as they do in a training."""

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        for _, layer in quantized_layers(pl_module):
            # Of linear layers and convolutions it changes nothing else.
            layer.training = True

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        for _, layer in quantized_layers(pl_module):
            layer.training = False


def _in_short(analysis: Analysis) -> str:
    """What a terminal shows of it."""
    said = "" if analysis.error is None else f"Quantized, the outputs move by {analysis.error:.1%} of their norm."
    if analysis.agreement is not None:
        said += f" {analysis.agreement:.1%} keep their class."
    worst = [layer for layer in worst_layers(analysis, 3) if layer.cost is not None]
    if worst:
        how = "without its quantizers" if worst[0].only_quantized is None else "alone"
        said += f" Most by {', '.join(f'{layer.name} ({layer.cost:.1%} {how})' for layer in worst)}."
    return said or f"{len(analysis.layers)} quantized layers."


@contextmanager
def _without(callbacks: list[pl.Callback], callback: pl.Callback) -> Iterator[None]:
    at = callbacks.index(callback)
    callbacks.remove(callback)
    try:
        yield
    finally:
        callbacks.insert(at, callback)


def _unpickled(ckpt_path: str | None) -> dict[str, Any]:
    return {} if ckpt_path is None else {"weights_only": True}
