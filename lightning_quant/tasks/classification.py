"""Image classification with any network from timm, torchvision or user code."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.nn.structure import rebuild
from lightning_quant.nn.what_ran import WhatRan
from lightning_quant.tasks.networks import create_network
from lightning_quant.tasks.schedules import RunSchedule, with_schedule

Batch = tuple[Tensor, Tensor]

_FROM_PYTHON = "network_from_python"


class ImageClassifier(LightningModule):
    """LightningModule for image classification on batches ``(images, labels)``.

    Logs ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc``. With more than five classes it
    also logs ``val/acc5`` and ``test/acc5``. Accuracies are in [0, 1].

    A checkpoint describes the network, but neither the source of its initial weights nor the optimizer's settings:
    ``ImageClassifier.load_from_checkpoint(path)`` downloads nothing and reads no other file. A network passed from
    Python is not described in the checkpoint: write ``load_from_checkpoint(path, model=network)``.

    Args:
        model: Any name in ``timm.list_models()``, which includes ``cifar_resnet20`` and its relatives;
            ``torchvision/vit_b_16`` or any other torchvision classifier; or, from Python, a network.
        num_classes: Width of the classifier.
        pretrained: Start from the published weights (a download); for torchvision the ``DEFAULT`` ones.
        checkpoint_path: Local ``.safetensors``, ``.pth`` or ``.ckpt`` file of the same network to start from.
        model_kwargs: Further arguments of ``timm.create_model``, such as ``{"in_chans": 1}``, or of
            ``torchvision.models.get_model``.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        mixup_alpha: Alpha of timm's mixup in training; 0 disables it.
        cutmix_alpha: Alpha of timm's cutmix in training; 0 disables it. With both enabled, each batch draws one.
        channels_last: Keep the network and the images in channels-last memory format.
        optimizer: Callable from parameters to an optimizer. The default is SGD as in INT4 training's CIFAR results.
        lr_scheduler: Callable from an optimizer to a scheduler, or ``"one_cycle"`` or ``"cosine"``, which step after
            every batch, span the whole run and take the optimizer's learning rate as their maximum.
        scheduler_interval: Interval at which a scheduler given as a callable steps.

    Shape:
        Images ``(N, C, H, W)`` to logits ``(N, num_classes)``.

    Raises:
        ConfigurationError: Unknown network name, number out of range, missing ``checkpoint_path``, or data with
            another number of classes.
        CheckpointError: A file whose tensors do not fit the network, or a checkpoint of a network from Python that
            is loaded without that network.

    Example:
        >>> classifier = ImageClassifier("cifar_resnet20", num_classes=10, model_kwargs={"in_chans": 1})
        >>> classifier(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> ImageClassifier("resnet_18", num_classes=10)
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: timm knows no network 'resnet_18'. Near: resnet18...
    """

    def __init__(
        self,
        model: str | nn.Module = "cifar_resnet20",
        num_classes: int = 10,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        channels_last: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        lr_scheduler: RunSchedule | LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        # Callables cannot be unpickled safely, and loading a checkpoint must not fetch the initial weights again.
        ignored = ["pretrained", "checkpoint_path", "optimizer", "lr_scheduler", "scheduler_interval"]
        self._named = isinstance(model, str)
        self.save_hyperparameters(ignore=ignored if self._named else ["model", *ignored])
        if num_classes < 2 or not 0 <= label_smoothing < 1 or min(mixup_alpha, cutmix_alpha) < 0:
            raise ConfigurationError(
                "Expected num_classes >= 2, label_smoothing in [0, 1), mixup_alpha >= 0, cutmix_alpha >= 0, "
                f"found {num_classes}, {label_smoothing}, {mixup_alpha} and {cutmix_alpha}."
            )
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.channels_last = channels_last
        self.network = create_network(model, num_classes, pretrained, checkpoint_path, model_kwargs)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.mixup = _mixup(mixup_alpha, cutmix_alpha, label_smoothing, num_classes)
        self.metrics = nn.ModuleDict({split: _accuracies(split, num_classes) for split in ("val", "test")})
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._scheduler_interval = scheduler_interval

    def forward(self, images: Tensor) -> Tensor:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def setup(self, stage: str) -> None:
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise ConfigurationError(
                f"The data has {classes} classes, the network {self.num_classes}. Write num_classes={classes}."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self._named:
            checkpoint[_FROM_PYTHON] = type(self.network).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._named and (network := checkpoint.get(_FROM_PYTHON)):
            raise CheckpointError(
                f"The checkpoint's network is a {network} passed from Python, which the checkpoint does not describe. "
                "Write load_from_checkpoint(path, model=NETWORK), or test ImageClassifier(NETWORK) with ckpt_path=PATH."
            )
        rebuild(self, checkpoint["state_dict"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mixup is None:
            loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        else:
            images, targets = _mix(self.mixup, images, labels)
            loss = F.cross_entropy(self(images), targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Return the class probabilities ``(N, num_classes)`` in FP32; labels in the batch are ignored."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).float().softmax(dim=-1)  # type: ignore[no-any-return]

    def configure_callbacks(self) -> list[Callback]:
        """Add the callback that reports how far the evaluated network was quantized."""
        return [WhatRan()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._optimizer(self.parameters())
        return with_schedule(optimizer, self._lr_scheduler, self, self._scheduler_interval)

    def _evaluate(self, batch: Batch, split: Literal["val", "test"]) -> None:
        images, labels = batch
        logits = self(images).float()
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        accuracies = self.metrics[split]
        assert isinstance(accuracies, MetricCollection)
        accuracies.update(logits, labels)
        self.log_dict(accuracies, prog_bar=True, batch_size=len(labels))


def _mixup(mixup: float, cutmix: float, label_smoothing: float, num_classes: int) -> Mixup | None:
    if mixup == cutmix == 0:
        return None
    return Mixup(  # type: ignore[no-untyped-call]
        mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes
    )


def _mix(mixup: Mixup, images: Tensor, labels: Tensor) -> Batch:
    if len(images) % 2:
        raise ConfigurationError(
            f"mixup and cutmix mix images in pairs, found a training batch of {len(images)}. "
            "Write an even batch_size and drop the last incomplete batch (drop_last=True)."
        )
    # timm mixes in place, and the batch may share memory with the data set.
    mixed, targets = mixup(images.clone(), labels)
    return mixed, targets


def _accuracies(split: str, num_classes: int) -> MetricCollection:
    accuracies = {"acc": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes > 5:
        accuracies["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return MetricCollection(dict(accuracies), prefix=f"{split}/")
