"""Training of image diffusion models with the networks and schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_quant.data.noise import initial_noise
from lightning_quant.errors import ConfigurationError
from lightning_quant.nn.structure import rebuild
from lightning_quant.tasks.denoisers import described, learned_target, noise_scheduler, unet
from lightning_quant.tasks.schedules import RunSchedule, with_schedule
from lightning_quant.utilities.files import Writer, check_replaceable, list_files, listed_files, whole_folder
from lightning_quant.utilities.paths import check_on_first_rank, user_path

Batch = Tensor | Sequence[Tensor]

INDEX = "model_index.json"
WRITER = Writer("ImageDiffusion.save_pipeline", partial(listed_files, index=INDEX), INDEX)
# Any number of multiples of the golden ratio is spread evenly over [0, 1).
_GOLDEN = (5**0.5 - 1) / 2
# Network and scheduler are saved as diffusers describes them; the rest belongs to the run.
_NOT_IN_CHECKPOINTS = [
    *("network", "scheduler", "sampling_steps", "seed", "pipeline"),
    *("optimizer", "lr_scheduler", "scheduler_interval"),
]


class ImageDiffusion(LightningModule):
    """LightningModule that trains a diffusers UNet to denoise images, and generates images with DDIM.

    Batches are ``(images, labels)`` or images alone. Images are in [-1, 1], as from a DataModule with ``mean`` and
    ``std`` of 0.5. Labels condition a network with ``num_class_embeds`` and are ignored otherwise. Logs
    ``train/loss`` and ``val/loss``, the mean squared error of the network's prediction. In validation, timestep and
    noise of each image are fixed, so that epochs are comparable.

    To average the weights, add Lightning's ``EMAWeightAveraging`` to the callbacks: validation and checkpoints then
    use the averaged weights, as do the module and its pipeline after the fit.

    Args:
        network: Arguments of ``diffusers.UNet2DModel``; the folder of such a network or of a pipeline, whose weights
            are loaded; or, from Python, a network.
        scheduler: Arguments of the scheduler that adds the noise, a DDIMScheduler unless ``_class_name`` says
            DDPMScheduler, as in diffusers' ``scheduler_config.json``; or the folder of a scheduler or of a pipeline.
            Its ``prediction_type`` sets what the network learns: the noise, the image or the velocity.
        padding: Width in pixels of the background (-1) added on each side of the images, and cropped from generated
            images.
        sampling_steps: Number of DDIM steps in ``predict``.
        seed: Seed of the noise in validation and of the images in ``predict``, not of the training.
        pipeline: Folder that :meth:`save_pipeline` writes when the fit ends; None writes nothing.
        optimizer: Callable from parameters to an optimizer.
        lr_scheduler: Schedule of the learning rate, see :class:`ImageClassifier`.
        scheduler_interval: Interval at which a scheduler given as a callable steps.

    Raises:
        ConfigurationError: Arguments that diffusers does not accept, numbers out of range, a missing folder, images
            of another size or range, or labels that do not fit ``num_class_embeds``.
        UnsupportedModelError: Network from Python that is not a ``UNet2DModel``.

    Source: Ho et al., NeurIPS 2020 (arXiv 2006.11239), the loss of equation 14; Salimans and Ho, ICLR 2022
    (arXiv 2202.00512), the velocity.

    Example:
        >>> blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
        >>> tiny = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8]}
        >>> module = ImageDiffusion({**tiny, **blocks, "norm_num_groups": 4}, sampling_steps=2)
        >>> module.generate(torch.tensor([0, 1, 2])).shape
        torch.Size([3, 1, 8, 8])
        >>> ImageDiffusion({"sample_sise": 8})
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: UNet2DModel has no argument 'sample_sise'. It has sample_size, ...
    """

    def __init__(
        self,
        network: dict[str, Any] | str | nn.Module,
        scheduler: dict[str, Any] | str | None = None,
        padding: int = 0,
        sampling_steps: int = 50,
        seed: int = 0,
        pipeline: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4),
        lr_scheduler: RunSchedule | LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "step",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=_NOT_IN_CHECKPOINTS)
        self.network = unet(network)
        self.scheduler = noise_scheduler(scheduler)
        self.hparams.update(network=described(self.network), scheduler=described(self.scheduler))
        steps = self.scheduler.config.num_train_timesteps
        if min(padding, seed) < 0 or not 1 <= sampling_steps <= steps:
            raise ConfigurationError(
                f"Expected padding and seed >= 0 and sampling_steps in 1..{steps}, the scheduler's "
                f"num_train_timesteps, found padding={padding}, seed={seed} and sampling_steps={sampling_steps}."
            )
        self.pipeline = None if pipeline is None else user_path(pipeline)
        if self.pipeline is not None and self.pipeline.is_file():
            raise ConfigurationError(f"pipeline='{self.pipeline}' is a file. Write pipeline=FOLDER.")
        if self.network.config.sample_size is None:
            raise ConfigurationError(
                "The network has no sample_size. Write sample_size, the height of the images including padding."
            )
        self.padding = padding
        self.sampling_steps = sampling_steps
        self.seed = seed
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._scheduler_interval = scheduler_interval
        self._served = 0
        self._checked = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input, padding included."""
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.network.config.in_channels, height, width

    def forward(self, images: Tensor, timesteps: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Return the network's prediction for noisy images ``(N, C, H, W)`` at timesteps ``(N,)`` or a single one."""
        prediction: Tensor = self.network(images, timesteps, class_labels=labels, return_dict=False)[0]
        return prediction

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.pipeline is not None:
            check_on_first_rank(self.trainer, partial(check_replaceable, self.pipeline, WRITER))
        self._checked = False
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        embedded = self.network.config.num_class_embeds
        if embedded is not None and classes is not None and classes > embedded:
            raise ConfigurationError(
                f"The data has {classes} classes, the network num_class_embeds={embedded}. "
                f"Write num_class_embeds: {classes}, or null for a network without classes."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rebuild(self, checkpoint["state_dict"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = self._images_and_labels(batch)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), device=self.device)
        loss = self._loss(images, labels, torch.randn_like(images), timesteps)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._served = 0

    def on_test_epoch_start(self) -> None:
        self._served = 0

    def on_predict_epoch_start(self) -> None:
        self._served = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Generate one image in [0, 1] for each row of the batch, ``(N, C, H, W)``.

        A batch is ids, ``(ids, labels)``, or a DataModule's ``(images, labels)``. Of such images only the number is
        used: their indices in the data set are the ids.
        """
        first, *rest = [batch] if isinstance(batch, Tensor) else batch
        ids = self._numbers(len(first)) if first.is_floating_point() else first
        return self.generate(ids, self._labels(rest))

    @torch.no_grad()
    def generate(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generate images with DDIM; an image depends on its id, not on the rest of the batch.

        Args:
            ids: Seeds of the initial noise, >= 0, ``(N,)``.
            labels: Classes of the images, ``(N,)``, for a network with ``num_class_embeds``.

        Returns:
            Images in [0, 1], ``(N, C, H, W)``, on the module's device.
        """
        from diffusers import DDIMScheduler

        sampler: Any = DDIMScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(self.sampling_steps)
        images = initial_noise(self.image_shape, ids, self.seed).to(self.device)
        for timestep in sampler.timesteps.tolist():
            images = sampler.step(self(images, timestep, labels), timestep, images).prev_sample
        return F.pad(images, (-self.padding,) * 4).add(1).div(2).clamp(0, 1)

    def on_fit_end(self) -> None:
        # EMAWeightAveraging moves the averaged weights into the module in on_train_end, which runs before this hook.
        if self.pipeline is not None and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save_pipeline(self.pipeline)

    def save_pipeline(self, folder: str | Path) -> None:
        """Write network and scheduler as a DDIMPipeline or DDPMPipeline, depending on the scheduler's class.

        The weights are the module's current ones: averaged after a fit with ``EMAWeightAveraging``, and when loaded
        from its checkpoints.

        Args:
            folder: Folder for ``DDIMPipeline.from_pretrained(folder)``. An earlier one is replaced once the new one
                is complete.

        Raises:
            ConfigurationError: Folder with files that this method did not write, or one that is not writable.
        """
        import diffusers

        pipeline = getattr(diffusers, type(self.scheduler).__name__.replace("Scheduler", "Pipeline"))
        with whole_folder(user_path(folder), WRITER) as new:
            pipeline(unet=self.network, scheduler=self.scheduler).save_pretrained(new)
            list_files(new, INDEX)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._optimizer(self.parameters())
        return with_schedule(optimizer, self._lr_scheduler, self, self._scheduler_interval)

    def _evaluate(self, batch: Batch, split: Literal["val", "test"]) -> None:
        images, labels = self._images_and_labels(batch)
        numbers = self._numbers(len(images))
        noise = initial_noise(self.image_shape, numbers, self.seed).to(images)
        shares = (numbers.double() + 0.5).mul(_GOLDEN).frac()
        timesteps = shares.mul(self.scheduler.config.num_train_timesteps).long().to(self.device)
        loss = self._loss(images, labels, noise, timesteps)
        self.log(f"{split}/loss", loss, sync_dist=True, prog_bar=True, batch_size=len(images))

    def _loss(self, images: Tensor, labels: Tensor | None, noise: Tensor, timesteps: Tensor) -> Tensor:
        prediction = self(self.scheduler.add_noise(images, noise, timesteps), timesteps, labels)
        return F.mse_loss(prediction.float(), learned_target(self.scheduler, images, noise, timesteps))

    def _numbers(self, count: int) -> Tensor:
        """Return the data-set indices of the next images of an evaluation, in the order of DistributedSampler."""
        ranks = getattr(self._trainer, "world_size", 1)
        numbers = torch.arange(self._served, self._served + count) * ranks + self.global_rank
        self._served += count
        return numbers

    def _images_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        images, *rest = [batch] if isinstance(batch, Tensor) else batch
        if not self._checked:
            # Only once, because reading the values synchronizes with the device.
            self._check_range(images)
            self._checked = True
        images = F.pad(images, (self.padding,) * 4, value=-1.0)
        if images.shape[1:] != self.image_shape:
            raise ConfigurationError(
                f"Found images {tuple(images.shape[1:])}, {self.padding} pixels of padding included, for a network of "
                f"{self.image_shape}. Write its in_channels and sample_size, or padding, to match the data."
            )
        return images, self._labels(rest)

    def _labels(self, rest: Sequence[Tensor]) -> Tensor | None:
        if self.network.config.num_class_embeds is None:
            return None
        if not rest:
            raise ConfigurationError(
                f"The network has num_class_embeds={self.network.config.num_class_embeds}, found a batch without "
                "labels. Write batches of (images, labels); for predict also (ids, labels)."
            )
        return rest[0]

    @staticmethod
    def _check_range(images: Tensor) -> None:
        low, high = images.min().item(), images.max().item()
        if not -1.001 <= low < 0 < high <= 1.001:
            raise ConfigurationError(
                f"Expected images in [-1, 1], found values from {low:.3g} to {high:.3g}. Write mean: [0.5] and "
                "std: [0.5] for the DataModule, one number per channel."
            )
