"""IGQ-ViT as a LightningModule whose fit is the calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant.data.calibration import calibration_images
from lightning_quant.data.calibration_source import calibration_source
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.igq_vit.cache import Cache
from lightning_quant.igq_vit.callback import IGQViT, is_calibrated
from lightning_quant.igq_vit.session import STEPS, Calibration
from lightning_quant.igq_vit.summary import summarise
from lightning_quant.nn.attention_check import check_attentions
from lightning_quant.nn.structure import mark
from lightning_quant.tasks import ImageClassifier


class _Steps(IterableDataset[int]):
    """As an iterable it is not divided among ranks: each does every step, on its share of the images."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


class _Loader(DataLoader[Any]):
    """Says to Lightning that it can go on in the middle."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Which step comes next is known to the calibration."""


class IGQViTModule(ImageClassifier):
    """A vision transformer of timm or torchvision whose ``fit`` calibrates it; then it validates, tests and predicts.

    Each training step is one step of the calibration: all quantizers first, then the perturbation of a layer each,
    then the allocation of groups. Lightning's progress bar, checkpoints and ``ckpt_path=`` work as in a training; a
    checkpoint holds the calibration so far, and the quantized network.

    Source: Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024 (arXiv 2404.00928).

    Args:
        model: as :class:`lightning_quant.ImageClassifier`, like the next four.
        num_classes: width of the classifier.
        pretrained: start from published weights (a download).
        checkpoint_path: start from a local file of float weights.
        model_kwargs: further arguments of the network.
        quantization: the arguments of the calibration, as the callback's or as a mapping of them.

    Raises:
        ConfigurationError: see :class:`lightning_quant.ImageClassifier` and :class:`lightning_quant.IGQViT`.
        UnsupportedModelError: a network without attention, or with one that is not known.

    >>> module = IGQViTModule("vit_tiny_patch16_224", 10, quantization=IGQViT(4, 4, groups=8))
    >>> module.quantization.settings.groups
    8
    """

    fit_is_calibration = True

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
        kept = {key: self.hparams[key] for key in ("model", "num_classes", "model_kwargs") if key in self.hparams}
        self.hparams.clear()
        self.hparams.update(kept, quantization=settings.as_dict())
        self._hparams_initial = dict(self.hparams)
        check_attentions(self.network, settings.exclude)
        self.automatic_optimization = False
        self.calibration: Calibration | None = None
        self._cache: Cache | None = None
        self._resumed: dict[str, torch.Tensor] = {}

    # -- fit ----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            # The steps take the place of the user's training batches, of which the draw of images takes what it needs.
            self.trainer.fit_loop._data_source.instance = self
            self.trainer.fit_loop.max_epochs = 1

    def on_fit_start(self) -> None:
        """Draw the images and prepare the network; continue where a checkpoint ended."""
        datamodule = getattr(self.trainer, "datamodule", None)
        data = self.quantization.calibration_data
        if datamodule is None and data is None:
            raise ConfigurationError(
                "IGQViTModule calibrates on images of a datamodule: call trainer.fit(module, datamodule=...), or give"
                " IGQViT(calibration_data=...)."
            )
        settings = self.quantization.settings
        images = calibration_images(
            calibration_source(data, datamodule),
            settings.calibration_images,
            settings.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        self.calibration = self.quantization.start(self.trainer, self, images)
        self._cache = Cache(self.trainer, self.quantization.cache_dir, self.calibration)
        if self._resumed:
            self.calibration.load_state_dict({key: value.to(self.device) for key, value in self._resumed.items()})
        else:
            self._cache.load()

    def train_dataloader(self) -> DataLoader[Any]:
        """The steps that are left."""
        assert self.calibration is not None
        # A loop that was restored counts the batches that were before it.
        before = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # Of what the cache has finished one is left that does nothing: without a batch no checkpoint is written.
        left = max(self.calibration.total - self.calibration.done, 1)
        return _Loader(_Steps(before + left), batch_size=None)

    def _apply_batch_transfer_handler(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # A step is no batch that the datamodule's hooks could take.
        return batch if self.trainer.training else super()._apply_batch_transfer_handler(batch, *args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """One step of the calibration."""
        assert self.calibration is not None
        assert self._cache is not None
        before = set(self.calibration.omega)
        if not self.calibration.finished:
            self.calibration.step()
            self._cache.save()
        for slot in set(self.calibration.omega) - before:
            table = self.calibration.omega[slot]
            self.log("calibration/kl", min(table.values()), prog_bar=True)
        # Counts the step: checkpoints are made by the number of optimizer steps.
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()

    def on_train_end(self) -> None:
        """Say what came out."""
        if self.calibration is not None and self.calibration.finished:
            rank_zero_info(summarise(self.calibration))

    def on_validation_start(self) -> None:
        """Refuse what is not calibrated; Lightning's sanity check before the calibration is of the float network."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._check_calibrated()

    def on_test_start(self) -> None:
        """Refuse what is not calibrated."""
        self._check_calibrated()

    def on_predict_start(self) -> None:
        """Refuse what is not calibrated."""
        self._check_calibrated()

    def _check_calibrated(self) -> None:
        if not is_calibrated(self):
            raise QuantizationError(
                "The network is not calibrated: call trainer.fit(module, datamodule) first, or pass ckpt_path= with a"
                " checkpoint of a calibration (lightning-quant calibrate, then test --ckpt_path FILE)."
            )
        state = self._resumed if self.calibration is None else self.calibration.state_dict()
        done, total = state[STEPS].tolist() if state else (0, 0)
        if done < total:
            raise QuantizationError(
                f"The calibration stopped after step {done} of {total}, before groups were allocated: go on with"
                " trainer.fit(module, datamodule, ckpt_path=...), then test."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.calibration is not None:
            checkpoint["igq_vit"] = self.calibration.state_dict()
        elif self._resumed:
            checkpoint["igq_vit"] = self._resumed
        mark(checkpoint["state_dict"], "IGQViT")
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get("igq_vit", {})
        self.calibration = None
