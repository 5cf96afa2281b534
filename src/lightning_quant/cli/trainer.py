"""The Trainer of the command line: Lightning's, with the verb `calibrate`."""

from __future__ import annotations

import warnings

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_quant.cli.advice import UsageError

# True of a training. The network of a calibration is in evaluation, and its steps are no data.
_UNTRUE = ("Found .* module.* in eval mode", "Your `IterableDataset` has `__len__` defined")


class CalibratingTrainer(Trainer):
    """Lightning's Trainer with one verb more; a verb of the command line is a method of its Trainer."""

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
