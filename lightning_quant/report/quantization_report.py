"""The report of a run, written by a callback when it ends."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_quant.analysis import Analysis, Recorder, analyze_network, quantized_root, trained_quantized
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.nn.agreement import divided_parameter
from lightning_quant.nn.modes import eager_execution, evaluating
from lightning_quant.nn.structure import quantizers_of, weights_hash
from lightning_quant.report.comparing import float_network, read_float_state
from lightning_quant.report.html import Figures, RunReport, report_folder, write_report
from lightning_quant.report.layer_charts import draw_noise, draw_sensitivity
from lightning_quant.report.methods import Method, method_of
from lightning_quant.report.remedies import Finding, effect, in_float
from lightning_quant.utilities.hashing import file_hash
from lightning_quant.utilities.paths import check_on_first_rank, check_writable, trainer_path, user_path
from lightning_quant.utilities.progress import ProgressBar
from lightning_quant.utilities.text import byte_size, large_number, listed

_LIBRARIES = ("lightning-quant", "torch", "lightning", "torchvision", "timm", "diffusers", "torchmetrics")


class QuantizationReport(pl.Callback):
    """Write ``quantization_report.html`` and its JSON twin when a fit, validation, test or prediction ends.

    The same figures go to the Trainer's loggers, as ``quantization/...``. While the run goes on, some of the calls of
    the network are recorded; at its end they are made again, quantized, in float, and with each layer alone, which
    takes two passes over them for each layer. The page opens from disk and loads nothing.

    Args:
        folder: where to; None takes the logger's folder, without logger the trainer's ``default_root_dir``.
        sensitivity: whether layers are measured one by one.
        images: rows of batches that are recorded at least.
        float_metrics: what the float network reached, by the names that your module logs, to stand beside.
        float_ckpt_path: Checkpoint of the float network to compare the outputs with. None takes the weights without
            their quantizers; of a network that was trained quantized those are no float network, and outputs are not
            compared.

    Raises:
        ConfigurationError: fewer images than one.

    Example:
        >>> from lightning_quant import GradientQuantization
        >>> trainer = pl.Trainer(callbacks=[GradientQuantization(), QuantizationReport("report")], logger=False)
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        sensitivity: bool = True,
        images: int = 32,
        float_metrics: Mapping[str, float] | None = None,
        float_ckpt_path: str | None = None,
    ) -> None:
        if images < 1:
            raise ConfigurationError(f"images={images}: expected at least one.")
        self.folder = None if folder is None else user_path(folder)
        self.sensitivity, self.images = sensitivity, images
        self.float_metrics = dict(float_metrics or {})
        self.float_ckpt_path = float_ckpt_path
        # Weights that were given ranges only to be measured are those of a float network.
        self.starts_in_float = False
        self.report: RunReport | None = None
        self.written: list[Path] = []
        self._recorder: Recorder | None = None
        self._root = ""
        self._start = 0.0

    @property
    def analysis(self) -> Analysis | None:
        """That of the last report."""
        return None if self.report is None else self.report.analysis

    # -- while it runs ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written to and a float checkpoint that cannot be read; count the time."""
        if self.float_ckpt_path is not None:
            read_float_state(self.float_ckpt_path)
        self._forget()
        check_on_first_rank(trainer, partial(check_writable, report_folder(trainer, self.folder)))
        self._start = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to a training of what is quantized; what is calibrated later trains in float."""
        if not getattr(pl_module, "fit_is_calibration", False):
            self._listen(pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Listen to a validation of its own; in a fit its batches count as those of the training."""
        self._listen(pl_module)

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Listen, after all callbacks have calibrated."""
        self._listen(pl_module)

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """Listen, after all callbacks have calibrated."""
        self._listen(pl_module)

    def _listen(self, pl_module: pl.LightningModule) -> None:
        if self._recorder is None and next(quantizers_of(pl_module), None) is not None:
            self._root = quantized_root(pl_module)
            self._recorder = Recorder(pl_module.get_submodule(self._root), self.images)

    # -- at its end ---------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what a training or a calibration came to."""
        calibration = getattr(pl_module, "calibration", None)
        if getattr(pl_module, "fit_is_calibration", False) and calibration is not None:
            self._listen(pl_module)
            with torch.no_grad():
                calibration.replay()
        self._write(trainer, pl_module, "fit")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what a validation of its own came to."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "validation")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what a test came to."""
        self._write(trainer, pl_module, "test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what a prediction came to."""
        self._write(trainer, pl_module, "prediction")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._forget()

    def _forget(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()
        self._recorder = None

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        seconds = time.perf_counter() - self._start
        # Asked on all ranks: the logger's folder is broadcast.
        folder = report_folder(trainer, self.folder)
        recorder = self._recorder
        self._forget()
        if not trainer.is_global_zero:
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Trainer makes it elsewhere
        if recorder is None and stage == "fit" and any(getattr(each, "calibrates", False) for each in callbacks):
            # Its network is in float until it is evaluated.
            return
        if recorder is None:
            rank_zero_warn(
                f"No report: nothing in {type(pl_module).__name__} is quantized and has a range. Add"
                " GradientQuantization, IGQViT or AccuQuant to the callbacks, or load a quantized checkpoint."
            )
            return
        network = pl_module.get_submodule(self._root)
        # One rank alone would wait for the pieces of the others.
        if divided_parameter(network):
            rank_zero_warn(
                "No report: the weights are divided among ranks. Save a whole checkpoint, and analyze it on one device,"
                " lightning_quant.analyze(module, datamodule, ckpt_path=...)."
            )
            return
        method = method_of(trainer, pl_module)
        # With one layer or another in float a compiled network would be compiled anew each time.
        with eager_execution(), tempfile.TemporaryDirectory() as drawn:
            try:
                analysis = self._analyzed(trainer, pl_module, network, recorder)
            except QuantizationError as error:
                rank_zero_warn(f"No report: {error}")
                return
            # As ``exclude`` takes them.
            analysis = analysis if method.names_are_of_the_denoiser else _below(self._root, analysis)
            self.report = self._report(trainer, pl_module, method, recorder, analysis, stage, seconds, user_path(drawn))
        self.written = write_report(folder, self.report)
        rank_zero_info(f"Report: {self.written[0]}")
        metrics = _logged(analysis)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _analyzed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, recorder: Recorder
    ) -> Analysis:
        path = self.float_ckpt_path
        options: dict[str, Any] = {
            "trained": trained_quantized(network) and not self.starts_in_float,
            "float_network": None if path is None else partial(float_network, pl_module, network, path),
        }
        if not self.sensitivity:
            return analyze_network(network, recorder.calls, sensitivity=False, **options)
        owners = {name.rpartition(".")[0] for name, _ in quantizers_of(network)}
        with ProgressBar(trainer, len(owners), "Layers one by one") as bar:
            return analyze_network(network, recorder.calls, advance=lambda name: bar.update(what=name), **options)

    def _report(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        method: Method,
        recorder: Recorder,
        analysis: Analysis,
        stage: str,
        seconds: float,
        drawn: Path,
    ) -> RunReport:
        pictures: dict[str, Path] = {}
        if any(layer.cost is not None for layer in analysis.layers):
            pictures["What each layer costs"] = drawn / "sensitivity.png"
            draw_sensitivity(analysis.layers, analysis.error, drawn / "sensitivity.png")
        pictures["Signal to quantization noise of each tensor"] = drawn / "noise.png"
        draw_noise(analysis.layers, drawn / "noise.png")
        network = pl_module.get_submodule(self._root)
        with torch.no_grad(), evaluating(network):
            pictures |= method.draw(drawn, pl_module, partial(recorder.calls[0].run, network))
        bits = sorted({figures.bits for layer in analysis.layers for figures in layer.tensors.values()})
        lead = (
            f"{method.detail}{len(analysis.layers)} layers and attentions of {type(pl_module).__name__} in"
            f" {listed(bits)} bits, after {stage}. {method.execution}"
        )
        return RunReport(
            title=f"{method.name}: {type(pl_module).__name__}",
            lead=lead,
            summary=self._summary(trainer, method, analysis, stage, seconds),
            analysis=analysis,
            pictures={title: path.read_bytes() for title, path in pictures.items()},
            environment=_environment(trainer, network, stage),
            advice=[*method.advice(), *_advice(analysis, method)],
            findings=method.findings(analysis),
            settings=method.settings,
            plan=method.plan,
            config=_config(trainer, pl_module),
            figures=method.figures(),
        )

    def _summary(
        self, trainer: pl.Trainer, method: Method, analysis: Analysis, stage: str, seconds: float
    ) -> list[Figures]:
        rows = []
        for name, value in sorted(trainer.callback_metrics.items()):
            known = self.float_metrics.get(name)
            rows.append(Figures(name, "" if known is None else f"{known:.4g}", f"{float(value):.4g}", "as logged"))
        if analysis.error is not None:
            named = "" if self.float_ckpt_path is None else f"; float is {self.float_ckpt_path}"
            note = f"norm of the difference over that of the float outputs, recorded calls{named}"
            rows.append(Figures("error of the outputs", "0", f"{analysis.error:.2%}", note))
        if analysis.agreement is not None:
            rows.append(Figures("same class as float", "all", f"{analysis.agreement:.1%}", "of the recorded calls"))
        share = analysis.quantized_bytes / analysis.float_bytes
        size = f"{byte_size(analysis.quantized_bytes)} ({share:.1%})"
        rows.append(Figures("size of the parameters", byte_size(analysis.float_bytes), size, "codes packed"))
        if analysis.float_bops and analysis.quantized_bops:
            share = analysis.quantized_bops / analysis.float_bops
            bops = f"{large_number(analysis.quantized_bops)} ({share:.2%})"
            note = "groups included" if any(layer.groups for layer in analysis.layers) else ""
            rows.append(Figures("bit operations an image", large_number(analysis.float_bops), bops, note))
        slower = analysis.quantized_seconds / analysis.float_seconds if analysis.float_seconds else 0.0
        note = f"of the recorded calls, {slower:.1f} times: simulated, which says nothing of low-bit units"
        took = [f"{1e3 * value:.1f} ms" for value in (analysis.float_seconds, analysis.quantized_seconds)]
        rows.append(Figures("time here", took[0], took[1], note))
        rows.append(Figures(f"the {stage}", "", f"{seconds:.0f} s", f"{byte_size(_peak_memory())} of memory at most"))
        return rows


def _below(root: str, analysis: Analysis) -> Analysis:
    """With names as the whole module has them."""
    if not root:
        return analysis

    def full(name: str) -> str:
        return f"{root}.{name}" if name else root

    layers = [replace(layer, name=full(layer.name)) for layer in analysis.layers]
    return replace(analysis, layers=layers, left_out=[full(name) for name in analysis.left_out])


def _logged(analysis: Analysis) -> dict[str, float]:
    """What goes to the user's loggers."""
    found = {"quantization/bytes": float(analysis.quantized_bytes)}
    for name in ("error", "agreement", "quantized_bops"):
        value = getattr(analysis, name)
        if value is not None:
            found[f"quantization/{name}"] = float(value)
    for layer in analysis.layers:
        if layer.only_quantized is not None:
            found[f"quantization/{layer.name}/only_quantized"] = layer.only_quantized
        if layer.moves is not None:
            found[f"quantization/{layer.name}/moves"] = layer.moves
        found |= {f"quantization/{layer.name}/{slot}_sqnr": each.sqnr for slot, each in layer.tensors.items()}
    return found


def _advice(analysis: Analysis, method: Method) -> Iterator[Finding]:
    """What the layers together suggest."""
    measured = [layer for layer in analysis.layers if layer.only_quantized]
    total = sum((layer.only_quantized or 0.0) ** 2 for layer in measured)
    if not measured or not total:
        return
    worst = max(measured, key=lambda layer: layer.only_quantized or 0.0)
    share = (worst.only_quantized or 0.0) ** 2 / total
    if len(measured) > 2 and share > 0.5:
        yield Finding(
            f"{worst.name} makes {share:.0%} of the squared error that layers make alone.",
            f"The others cost little: leave it in float{effect(worst, analysis)}.",
            in_float(worst.name, method.settings).line,
        )


def _environment(trainer: pl.Trainer, network: nn.Module, stage: str) -> dict[str, str]:
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    libraries = []
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            libraries.append(f"{name} {version(name)}")
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(PurePath(word).name if at == 0 else word for at, word in enumerate(sys.argv)),
        "device": f"{device.type}, {hardware}, {torch.get_num_threads()} threads, {trainer.world_size} processes",
        "precision": str(trainer.precision),
        "seed": os.environ.get("PL_GLOBAL_SEED", "none was set"),
        "versions": f"Python {platform.python_version()}, {', '.join(libraries)}",
        "SHA-256 of the float weights": weights_hash(network),
        **_artefacts(trainer, written=stage == "fit"),
    }


def _artefacts(trainer: pl.Trainer, written: bool) -> dict[str, str]:
    """Hashes of the checkpoint that the run has read, and of the best and the last that a fit has written."""
    found = {trainer.ckpt_path: "read"}
    for callback in trainer.checkpoint_callbacks if written else []:
        for name in ("best_model_path", "last_model_path"):
            found.setdefault(getattr(callback, name, None), "written")
    # Others are on another machine's disk, or somewhere in a cloud.
    local = {trainer_path(path): what for path, what in found.items() if path and "://" not in str(path)}
    files = {path: what for path, what in local.items() if path.is_file()}
    return {f"SHA-256 of {path}": f"{file_hash(path)}, {what}" for path, what in files.items()}


def _config(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """That of the command line where there is one, else what module and callbacks say of themselves."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        parser, config = getattr(callback, "parser", None), getattr(callback, "config", None)
        if parser is not None and config is not None:
            text: str = parser.dump(config, skip_none=True)
            return text
    hyperparameters = "\n".join(f"{name}: {value}" for name, value in pl_module.hparams.items())
    return f"{type(pl_module).__name__}\n{hyperparameters}".strip()


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows does not have

    # Kilobytes, but on a Mac bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
