"""The Trainer of the command line: Lightning's Trainer with the verbs `calibrate` and `analyze`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_quant.cli.advice import UsageError

# These warnings apply to training only: calibration runs in eval mode, and its steps carry no data.
_TRAINING_ONLY = ("Found .* module.* in eval mode", "Your `IterableDataset` has `__len__` defined")


class CalibratingTrainer(Trainer):
    """Lightning's Trainer with the additional verbs ``calibrate`` and ``analyze``.

    Each verb of the command line is a method of its Trainer. ``validate`` and ``test`` can also evaluate the float
    network and print both results side by side.
    """

    def validate(  # type: ignore[override]
        self, *args: Any, compare_float: bool = False, float_ckpt_path: str | None = None, **kwargs: Any
    ) -> Any:
        """Evaluate on the validation set.

        Args:
            args: Arguments of ``Trainer.validate``.
            compare_float: Whether to evaluate the float network too, and print both results.
            float_ckpt_path: Checkpoint of the float network; needed to compare a network that was trained quantized.
            kwargs: Arguments of ``Trainer.validate``.
        """
        with self._comparing(compare_float, float_ckpt_path) as compared:
            results = super().validate(*args, **kwargs)
        if compared:
            _print_comparison(self, results, "validate", float_ckpt_path, args, kwargs)
        return results

    def test(  # type: ignore[override]
        self, *args: Any, compare_float: bool = False, float_ckpt_path: str | None = None, **kwargs: Any
    ) -> Any:
        """Evaluate on the test set.

        Args:
            args: Arguments of ``Trainer.test``.
            compare_float: Whether to evaluate the float network too, and print both results.
            float_ckpt_path: Checkpoint of the float network; needed to compare a network that was trained quantized.
            kwargs: Arguments of ``Trainer.test``.
        """
        with self._comparing(compare_float, float_ckpt_path) as compared:
            results = super().test(*args, **kwargs)
        if compared:
            _print_comparison(self, results, "test", float_ckpt_path, args, kwargs)
        return results

    def analyze(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        folder: str | None = None,
        sensitivity: bool = True,
        images: int = 32,
        float_ckpt_path: str | None = None,
    ) -> None:
        """Measure a quantized network layer by layer on its test data, and write a report.

        Args:
            model: Module that a checkpoint or a callback such as `--quantization IGQViT` quantizes.
            datamodule: DataModule with the test data; None if the model has its own.
            ckpt_path: Checkpoint of a quantized run.
            folder: Folder for quantization_report.html and .json; None takes the logger's.
            sensitivity: Whether to measure the layers one by one.
            images: Minimum number of images for the measurement.
            float_ckpt_path: Checkpoint of the float network; needed for a network that was trained quantized.

        Raises:
            QuantizationError: Network with no layer that is quantized or can be.
        """
        from lightning_quant.report.analyzing import analyze  # imports libraries that help does not need

        analyze(model, datamodule, folder, ckpt_path, sensitivity, images, self, float_ckpt_path)

    def calibrate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Calibrate a quantized network on unlabeled images, or a diffusion model on its own samples.

        This is `fit` of a module whose fit is its calibration, with all that Lightning does around a fit.

        Args:
            model: Module with `fit_is_calibration = True`, such as IGQViTModule and AccuQuantModule.
            datamodule: DataModule with the calibration images, if the module needs any.
            ckpt_path: Checkpoint of an interrupted calibration to resume.

        Raises:
            UsageError: Module whose fit is a training.

        Example:
            >>> from lightning.pytorch.demos.boring_classes import BoringModel
            >>> trainer = CalibratingTrainer(logger=False, enable_checkpointing=False, accelerator="cpu")
            >>> trainer.calibrate(BoringModel())
            Traceback (most recent call last):
            ...
            lightning_quant.cli.advice.UsageError: BoringModel is trained, not calibrated...
        """
        if getattr(model, "fit_is_calibration", False):
            with warnings.catch_warnings():
                for message in _TRAINING_ONLY:
                    warnings.filterwarnings("ignore", message)
                self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
            return
        name = type(model).__name__
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]  # Trainer makes it elsewhere
        calibrating = (type(callback).__name__ for callback in callbacks if getattr(callback, "calibrates", False))
        callback_name = next(calibrating, None)
        if callback_name is not None:
            raise UsageError(
                f"{callback_name} calibrates {name} when an evaluation starts; write lightning-quant test with the same"
                " options."
            )
        from lightning_quant.accuquant.denoiser import SUPPORTED  # imports libraries that help does not need

        denoises = any(type(layer).__name__ in SUPPORTED for layer in model.modules())
        method = "AccuQuant" if denoises else "IGQViT"
        raise UsageError(
            f"{name} is trained, not calibrated; write lightning-quant calibrate --model {method}Module ..., or"
            f" lightning-quant test --quantization {method} ..., which calibrates {name} first."
        )

    @contextmanager
    def _comparing(self, compare_float: bool, float_ckpt_path: str | None) -> Iterator[bool]:
        """Check before the first batch that the comparison with the float network is possible."""
        if not compare_float and float_ckpt_path is None:
            yield False
            return
        from lightning_quant.report.comparing import Comparable  # imports libraries that help does not need

        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        check = Comparable(float_ckpt_path)
        callbacks.append(check)
        try:
            yield True
        finally:
            callbacks.remove(check)


def _print_comparison(
    trainer: Trainer,
    results: Any,
    verb: Any,
    float_ckpt_path: str | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    from lightning_quant.report.comparing import compare

    model, *dataloaders = args or (kwargs["model"],)
    data = {name: value for name, value in kwargs.items() if name in ("datamodule", "dataloaders")}
    if dataloaders:
        data["dataloaders"] = dataloaders[0]
    comparison = compare(trainer, model, results, verb, float_ckpt_path, **data)
    if trainer.is_global_zero:
        print(comparison)
