"""The Trainer of the command line: Lightning's, with the verbs `calibrate` and `analyze`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_quant.cli.advice import UsageError

# True of a training. The network of a calibration is in evaluation, and its steps are no data.
_UNTRUE = ("Found .* module.* in eval mode", "Your `IterableDataset` has `__len__` defined")


class CalibratingTrainer(Trainer):
    """Lightning's Trainer with two verbs more; a verb of the command line is a method of its Trainer.

    ``validate`` and ``test`` can evaluate in float too, and print both side by side.
    """

    def validate(  # type: ignore[override]
        self, *args: Any, compare_float: bool = False, float_ckpt_path: str | None = None, **kwargs: Any
    ) -> Any:
        """Evaluate on the validation set.

        Args:
            args: Arguments of ``Trainer.validate``.
            compare_float: Whether the float network is evaluated too, and both are printed.
            float_ckpt_path: Checkpoint of the float network, needed to compare what was trained quantized.
            kwargs: Arguments of ``Trainer.validate``.
        """
        with self._comparing(compare_float, float_ckpt_path) as compared:
            found = super().validate(*args, **kwargs)
        if compared:
            _print_comparison(self, found, "validate", float_ckpt_path, args, kwargs)
        return found

    def test(  # type: ignore[override]
        self, *args: Any, compare_float: bool = False, float_ckpt_path: str | None = None, **kwargs: Any
    ) -> Any:
        """Evaluate on the test set.

        Args:
            args: Arguments of ``Trainer.test``.
            compare_float: Whether the float network is evaluated too, and both are printed.
            float_ckpt_path: Checkpoint of the float network, needed to compare what was trained quantized.
            kwargs: Arguments of ``Trainer.test``.
        """
        with self._comparing(compare_float, float_ckpt_path) as compared:
            found = super().test(*args, **kwargs)
        if compared:
            _print_comparison(self, found, "test", float_ckpt_path, args, kwargs)
        return found

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
        """Measure a quantized network layer by layer on its test data, and write a report of it.

        Args:
            model: Quantized, by a checkpoint or by a callback such as `--quantization IGQViT`.
            datamodule: Of the test data; None where the model has its own.
            ckpt_path: A checkpoint of a quantized run.
            folder: For quantization_report.html and .json; None takes the logger's.
            sensitivity: Whether layers are measured one by one.
            images: Rows of batches that they are measured on at least.
            float_ckpt_path: Checkpoint of the float network to compare with, where it was trained quantized.

        Raises:
            QuantizationError: Nothing that is quantized, or could be.
        """
        from lightning_quant.report.analyzing import analyze  # brings libraries that help does without

        analyze(model, datamodule, folder, ckpt_path, sensitivity, images, self, float_ckpt_path)

    def calibrate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Calibrate a quantized network: on unlabelled images, or on what a diffusion model samples.

        It is `fit` of a module whose fit is its calibration, with all that Lightning does around a fit.

        Args:
            model: A module with `fit_is_calibration = True`, such as IGQViTModule and AccuQuantModule.
            datamodule: Where the images come from, if it needs any.
            ckpt_path: A checkpoint of a stopped calibration, which goes on from there.

        Raises:
            UsageError: A module that is trained by its fit.

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
                for message in _UNTRUE:
                    warnings.filterwarnings("ignore", message)
                self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
            return
        name = type(model).__name__
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]  # Trainer makes it elsewhere
        callback = next((type(each).__name__ for each in callbacks if getattr(each, "calibrates", False)), None)
        if callback is not None:
            raise UsageError(
                f"{callback} calibrates {name} when an evaluation starts; write lightning-quant test with the same"
                " options."
            )
        from lightning_quant.accuquant.denoiser import SUPPORTED  # brings libraries that help does without

        denoises = any(type(layer).__name__ in SUPPORTED for layer in model.modules())
        method = "AccuQuant" if denoises else "IGQViT"
        raise UsageError(
            f"{name} is trained, not calibrated; write lightning-quant calibrate --model {method}Module ..., or"
            f" lightning-quant test --quantization {method} ..., which calibrates {name} first."
        )

    @contextmanager
    def _comparing(self, compare_float: bool, float_ckpt_path: str | None) -> Iterator[bool]:
        """Refuse what cannot be compared before its first batch."""
        if not compare_float and float_ckpt_path is None:
            yield False
            return
        from lightning_quant.report.comparing import Comparable  # brings libraries that help does without

        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        check = Comparable(float_ckpt_path)
        callbacks.append(check)
        try:
            yield True
        finally:
            callbacks.remove(check)


def _print_comparison(
    trainer: Trainer, found: Any, verb: Any, float_ckpt_path: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    from lightning_quant.report.comparing import compare

    model, *dataloaders = args or (kwargs["model"],)
    data = {name: value for name, value in kwargs.items() if name in ("datamodule", "dataloaders")}
    if dataloaders:
        data["dataloaders"] = dataloaders[0]
    comparison = compare(trainer, model, found, verb, float_ckpt_path, **data)
    if trainer.is_global_zero:
        print(comparison)
