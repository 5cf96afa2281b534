"""IGQ-ViT as a LightningModule whose fit is the calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_quant.calibration.image_source import calibration_source, with_hooks
from lightning_quant.calibration.module import CalibratingModule
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import ConfigurationError
from lightning_quant.igq_vit.calibration import Calibration
from lightning_quant.igq_vit.callback import IGQViT
from lightning_quant.igq_vit.shortlist import combined
from lightning_quant.nn.attention_check import check_attentions
from lightning_quant.tasks import ImageClassifier


class IGQViTModule(CalibratingModule, ImageClassifier):
    """Vision transformer of timm or torchvision whose ``fit`` calibrates it, ready to validate, test and predict.

    Each training step is one step of the calibration: first all quantizers, then the estimates of all perturbations,
    then the perturbations of one layer per step, then the allocation of groups. Lightning's progress bar, checkpoints
    and ``ckpt_path=`` work as in training. A checkpoint holds the calibration so far and the quantized network.

    Source: Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024 (arXiv 2404.00928).

    Args:
        model: Network, or its name, as for :class:`lightning_quant.ImageClassifier`.
        num_classes: Number of classes.
        pretrained: Whether to start from published weights, which are downloaded.
        checkpoint_path: Path of a local file of float weights to start from.
        model_kwargs: Further arguments of the network.
        quantization: Callback that holds the arguments of the calibration, or a mapping of these arguments.

    Raises:
        ConfigurationError: See :class:`lightning_quant.ImageClassifier` and :class:`lightning_quant.IGQViT`.
        UnsupportedModelError: Network without attention, or with an unknown one.

    Example:
        >>> module = IGQViTModule("vit_tiny_patch16_224", 10, quantization=IGQViT(4, 4, groups=8))
        >>> module.quantization.settings.groups
        8
    """

    calibration_key: ClassVar[str] = "igq_vit"
    callback_name: ClassVar[str] = "IGQViT"

    calibration: Calibration | None

    def __init__(
        self,
        model: str | nn.Module = "deit_small_patch16_224",
        num_classes: int = 1000,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        quantization: IGQViT | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, num_classes, pretrained, checkpoint_path, model_kwargs)
        self.quantization = IGQViT(**quantization) if isinstance(quantization, Mapping) else quantization or IGQViT()
        settings = self.quantization.settings
        # Without the arguments of training, which this class does not have.
        names = ("model", "num_classes", "model_kwargs")
        network_arguments = {name: self.hparams[name] for name in names if name in self.hparams}
        self.hparams.clear()
        self.hparams.update(network_arguments, quantization=settings.as_dict())
        self._hparams_initial = dict(self.hparams)
        check_attentions(self.network, settings.exclude)

    def start_calibration(self) -> Calibration:
        """Sample the images and prepare the network."""
        datamodule = getattr(self.trainer, "datamodule", None)
        data = self.quantization.calibration_data
        if datamodule is None and data is None:
            raise ConfigurationError(
                "IGQViTModule calibrates on images of a datamodule: call trainer.fit(module, datamodule=...), or write"
                " quantization=IGQViT(calibration_data=...)."
            )
        images = self.quantization.draw(
            self.trainer, lambda: with_hooks(calibration_source(data, datamodule), datamodule, self)
        )
        return self.quantization.start(self.trainer, self, images)

    def state_file(self, calibration: Calibration) -> StateFile:
        """Return the state file of the callback."""
        return self.quantization.state_file(self.trainer, calibration)

    def after_step(self, calibration: Calibration) -> None:
        """Log the smallest divergence of the layer that the last step perturbed."""
        if calibration.omega and not calibration.groups:
            (name, slot), last = next(reversed(calibration.omega.items()))
            divergences = combined(calibration.estimates[name, slot], last)
            self.log("calibration/kl", min(divergences.values()), prog_bar=True)

    def summarize(self, calibration: Calibration) -> str:
        """Summarize groups and bit operations."""
        return self.quantization.summarize(calibration)
