"""Analysis of a quantized module on its test data, from Python and from the command line."""

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

    A module that already has ranges is tested as it is, and a checkpoint determines how its module is quantized.
    Otherwise a callback of the Trainer quantizes the module: IGQViT and AccuQuant calibrate it, and
    GradientQuantization, which learns its ranges in training, initializes them from the first test batch.

    Args:
        module: Module that is quantized, or that a callback of the Trainer or the checkpoint quantizes.
        datamodule: DataModule of the test data, one or several DataLoaders, or a list of batches; None if the module
            has its own data.
        folder: Folder of the report. None takes the logger's folder, or the Trainer's ``default_root_dir`` without a
            logger.
        ckpt_path: Checkpoint of a quantized run.
        sensitivity: Whether to measure the layers one by one.
        images: Minimum number of recorded batch rows to measure the layers on.
        trainer: Trainer to test with; None creates one without logger and checkpoints.
        float_ckpt_path: Checkpoint of the float network to compare with. None takes the quantized network's weights
            without quantizers, except for a network that was trained quantized, which is then not compared.

    Returns:
        Figures of the layers and of the network.

    Raises:
        QuantizationError: Nothing in the module is quantized.
        ConfigurationError: Data that cannot be read twice or is not in batches, or a folder that cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_quant import DigitsDataModule, GradientQuantization, ImageClassifier
        >>> module = ImageClassifier("cifar_resnet20", 10, model_kwargs={"in_chans": 1})
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = pl.Trainer(callbacks=[GradientQuantization()], accelerator="cpu", limit_test_batches=1, **quiet)
        >>> with TemporaryDirectory() as folder:
        ...     analysis = analyze(module, DigitsDataModule(), folder, sensitivity=False, trainer=trainer)
        >>> len(analysis.layers)
        18
    """
    data = None if datamodule is None else _readable(datamodule)
    ckpt_path = None if ckpt_path is None else local_path(ckpt_path)
    run = trainer or pl.Trainer(logger=False, enable_checkpointing=False)
    report = QuantizationReport(folder, sensitivity, images, float_ckpt_path=float_ckpt_path)
    callbacks: list[pl.Callback] = run.callbacks  # type: ignore[attr-defined]  # the Trainer sets it elsewhere
    training = next((callback for callback in callbacks if isinstance(callback, GradientQuantization)), None)
    untrained = ckpt_path is None and not any(q.ready for _, q in quantizers_of(module))
    with ExitStack() as stack:
        if training is not None and untrained:
            stack.enter_context(_without(callbacks, training))
            if not is_quantized(module):
                quantize_layers(module, training.plan(module).chosen, training.interval)
            rank_zero_info("Not trained yet: the first test batch initializes the ranges, as at the start of training.")
            callbacks.append(_Start())
            report.starts_in_float = True
        callbacks.append(report)
        try:
            run.test(module, data, ckpt_path=ckpt_path, verbose=False, **_weights_only(ckpt_path))
        finally:
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, _Start)]
            callbacks.remove(report)
    if report.report is None:
        raise QuantizationError(
            f"Nothing in {type(module).__name__} is quantized: add GradientQuantization, IGQViT or AccuQuant to the"
            " Trainer's callbacks, or write ckpt_path= with the checkpoint of a quantized run."
        )
    has_float = report.starts_in_float or not trained_quantized(module) or float_ckpt_path is not None
    if has_float and not (isinstance(module, CalibratingModule) and module.own_batches):
        metrics = float_metrics(run, module, "test", float_ckpt_path, dataloaders=data)
        write_report(report.written[0].parent, with_float(report.report, metrics))
    rank_zero_info(f"{_summarize(report.report.analysis)}\nReport: {report.written[0]}")
    return report.report.analysis


def _readable(data: TestData) -> TestData:
    """Return data that Lightning can read twice, quantized and in float."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ConfigurationError(
            f"The test data is a {type(data).__name__}, which has no batches: write DataLoader(dataset, batch_size=32)."
        )
    if isinstance(data, Iterator) or not isinstance(data, pl.LightningDataModule | Iterable):
        raise ConfigurationError(
            f"The test data is a {type(data).__name__}, which cannot be read twice, quantized and in float: pass"
            " a DataLoader, a DataModule or a list of batches."
        )
    if isinstance(data, list | tuple) and not any(isinstance(item, DataLoader) for item in data):
        # Lightning would take each element of a list for a loader.
        batches: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
        return batches
    return data


class _Start(pl.Callback):
    """Callback that initializes quantizers from the first test batch, as at the start of training."""

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        for _, layer in quantized_layers(pl_module):
            # It changes nothing else in linear layers and convolutions.
            layer.training = True

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        for _, layer in quantized_layers(pl_module):
            layer.training = False


def _summarize(analysis: Analysis) -> str:
    """Summarize an analysis for the terminal."""
    summary = "" if analysis.error is None else f"Quantization moves the outputs by {analysis.error:.1%} of their norm."
    if analysis.agreement is not None:
        summary += f" {analysis.agreement:.1%} keep their class."
    worst = [layer for layer in worst_layers(analysis, 3) if layer.cost is not None]
    if worst:
        condition = "without its quantizers" if worst[0].only_quantized is None else "alone"
        costs = ", ".join(f"{layer.name} ({layer.cost:.1%} {condition})" for layer in worst)
        summary += f" The most sensitive layers are {costs}."
    return summary or f"{len(analysis.layers)} quantized layers."


@contextmanager
def _without(callbacks: list[pl.Callback], callback: pl.Callback) -> Iterator[None]:
    index = callbacks.index(callback)
    callbacks.remove(callback)
    try:
        yield
    finally:
        callbacks.insert(index, callback)


def _weights_only(ckpt_path: str | None) -> dict[str, Any]:
    return {} if ckpt_path is None else {"weights_only": True}
