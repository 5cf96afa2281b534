"""AccuQuant as a LightningModule around a diffusion pipeline, for calibration, measurement and generation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_quant.accuquant.calibration import Calibration
from lightning_quant.accuquant.callback import AccuQuant
from lightning_quant.accuquant.generation import Conditions, GeneratedImages, generate_images, read_images, write_images
from lightning_quant.accuquant.pipelines import DiffusionModel, load_float_pipeline
from lightning_quant.accuquant.preparation import Parts, image_numbers, sampler_for, trajectories
from lightning_quant.accuquant.source import accumulated_errors, single_step_errors
from lightning_quant.calibration.module import CalibratingModule
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import ConfigurationError
from lightning_quant.metrics import GenerationMetrics
from lightning_quant.nn.structure import in_float
from lightning_quant.utilities.distributed import on_all_ranks
from lightning_quant.utilities.paths import check_writable, user_path

# Number of the first generated image: generated images differ from those of the calibration.
FIRST_GENERATED = 1_000_000
# Number of images in a report.
SHOWN = 16


class AccuQuantModule(CalibratingModule):
    """LightningModule around a diffusers pipeline whose ``fit`` is its calibration.

    ``fit`` (``lightning-quant calibrate``) calibrates, one calibration step per training step. ``validate`` measures
    the error accumulated over held-out trajectories. ``test`` generates images with the float and the quantized
    denoiser from the same seeds and compares them. ``predict`` generates images in batches over all ranks. An image
    depends on its number and the seed alone.

    Source: Lee et al., "AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models", NeurIPS 2025
    (arXiv 2510.20348).

    Args:
        model: Folder of a diffusers pipeline or its name on the hub (DDPM, DDIM, LDM, Stable Diffusion, DiT; see
            :func:`~lightning_quant.accuquant.pipelines.load_float_pipeline`), or a pipeline object.
        scheduler: Folder of a scheduler to use instead of the pipeline's.
        class_embedding: File with the table of classes of a class-conditional LDM.
        prompts: File with one prompt per line, for text-to-image; or a safetensors file, see
            :func:`~lightning_quant.accuquant.text_encoding.read_embeddings`.
        classes: Number of classes to draw from; None takes the model's.
        images: Number of images that ``test`` and ``predict`` generate.
        image_batch_size: Number of images generated at once on one rank.
        image_folder: Folder for the PNG files of ``predict``, named by number; None writes none.
        real_images: Folder of images of the data, for FID.
        metrics: Metrics of ``test``, a :class:`lightning_quant.GenerationMetrics` or a mapping of its arguments.
        quantization: Settings of the calibration, an ``AccuQuant`` callback or a mapping of its arguments.

    Raises:
        ConfigurationError, UnsupportedModelError, CheckpointError: See ``load_float_pipeline`` and
            :class:`lightning_quant.AccuQuant`.

    Example:
        >>> from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
        >>> sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> pipeline = DDIMPipeline(UNet2DModel(**sizes, **blocks, add_attention=False), DDIMScheduler())
        >>> module = AccuQuantModule(pipeline, quantization=AccuQuant(4, 8, steps=20, window=4))
        >>> module.quantization.settings.window
        4
    """

    calibration_key: ClassVar[str] = "accuquant"
    callback_name: ClassVar[str] = "AccuQuant"
    own_batches: ClassVar[bool] = True

    calibration: Calibration | None

    def __init__(
        self,
        model: str | Any,
        scheduler: str | None = None,
        class_embedding: str | None = None,
        prompts: str | None = None,
        classes: int | None = None,
        images: int = 64,
        image_batch_size: int = 16,
        image_folder: str | Path | None = None,
        real_images: str | None = None,
        metrics: GenerationMetrics | dict[str, Any] | None = None,
        quantization: AccuQuant | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("images", images), ("image_batch_size", image_batch_size)):
            if value < 1:
                raise ConfigurationError(f"{name}={value!r}: expected a whole number of at least 1.")
        self.quantization = (
            AccuQuant(**quantization) if isinstance(quantization, Mapping) else quantization or AccuQuant()
        )
        self.metrics = GenerationMetrics(**metrics) if isinstance(metrics, Mapping) else metrics or GenerationMetrics()
        named = {"model": model} if isinstance(model, str | Path) else {}
        self.hparams.update(
            {key: str(value) for key, value in named.items()},
            scheduler=scheduler,
            class_embedding=class_embedding,
            prompts=prompts,
            classes=classes,
            quantization=self.quantization.settings.as_dict(),
        )
        self._hparams_initial = dict(self.hparams)
        # In a tuple, to keep the autoencoder out of the checkpoint.
        self._model = (load_float_pipeline(model, scheduler=scheduler, class_embedding=class_embedding),)
        self.network = self._model[0].network.requires_grad_(False)
        self.images, self.image_batch_size = images, image_batch_size
        self.image_folder = None if image_folder is None else user_path(image_folder)
        self.real_images = real_images
        settings = self.quantization.settings
        self.conditions = Conditions(self.model, settings.guidance, settings.seed, classes, prompts)
        self.generation_report: dict[str, Any] = {}
        sampler_for(self.parts, settings)

    @property
    def model(self) -> DiffusionModel:
        """The pipeline's model, whose denoiser is :attr:`network`."""
        return self._model[0]

    @property
    def parts(self) -> Parts:
        """Denoiser, scheduler, state shape and conditioning for the calibration."""
        denoiser = self.model.denoiser(self.quantization.settings.guidance)
        return Parts(denoiser, self.model.scheduler, self.model.sample_shape, self.conditions.rows)

    # -- fit ----------------------------------------------------------------------------------------------------------

    def start_calibration(self) -> Calibration:
        """Generate the float trajectories and prepare the denoiser."""
        return self.quantization.start(self.trainer, self.parts)

    def state_file(self, calibration: Calibration) -> StateFile:
        """Return the file that the calibration is saved to and resumed from."""
        return self.quantization.state_file(self.trainer, calibration)

    def after_step(self, calibration: Calibration) -> None:
        """Log the loss, and the held-out error if it was measured again."""
        if calibration.updates:
            self.log("calibration/loss", calibration.loss, prog_bar=True, rank_zero_only=True)
        if calibration.worth_saving and calibration.errors:
            last = next(reversed(calibration.errors.values()))
            self.log("calibration/held_out_error", float(last[-1]), prog_bar=True, rank_zero_only=True)

    def summarize(self, calibration: Calibration) -> str:
        """Summarize the window and the errors before and after the calibration."""
        return self.quantization.summarize(calibration)

    # -- validate -----------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> DataLoader[Any]:
        """Return one batch, which stands for the held-out trajectories."""
        return DataLoader([0])  # type: ignore[arg-type]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the RMSE to the float model in the middle and at the end of the held-out trajectories."""
        accumulated, _ = self.trajectory_errors()
        for name, error in (("middle", accumulated[len(accumulated) // 2]), ("end", accumulated[-1])):
            # The error is already reduced over ranks.
            self.log(f"val/error_{name}", float(error), batch_size=1)

    def trajectory_errors(self) -> tuple[Tensor, Tensor]:
        """Return the accumulated (steps + 1,) and the single-step (steps,) RMSE on the held-out trajectories."""
        parts, settings = self.parts, self.quantization.settings
        sampler, held_out = sampler_for(parts, settings), image_numbers(settings)[1]
        with torch.inference_mode(False), torch.no_grad():
            with in_float(self.network):
                cache = trajectories(self.trainer, parts, sampler, settings, self.quantization.cache_dir, held_out)
            ids = list(held_out)[self.trainer.global_rank :: self.trainer.world_size]
            reference = cache.trajectories(ids) if ids else None
            accumulated = accumulated_errors(parts.denoiser, sampler, reference)
            single_step = single_step_errors(parts.denoiser, sampler, reference)
        return accumulated, single_step

    # -- test ---------------------------------------------------------------------------------------------------------

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of image numbers."""
        return self.predict_dataloader()

    def on_test_start(self) -> None:
        """Reset the metrics, and update them with the real images."""
        super().on_test_start()
        self.metrics.reset()
        self.generation_report = {}
        if self.real_images is not None:
            rank, ranks = self.trainer.global_rank, self.trainer.world_size
            for ids, images in read_images(self.real_images, self.image_batch_size, rank, ranks):
                self.metrics.update_real(images.to(self.device), ids)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Compare the images of the float and the quantized denoiser."""
        with in_float(self.network):
            reference = self.generate(batch)
        quantized = self.generate(batch)
        self.metrics.update(quantized, reference, prompts=self.conditions.texts(batch), ids=batch)
        empty = {"float": reference[:0].cpu(), "quantized": quantized[:0].cpu()}
        samples = self.generation_report.setdefault("images", empty)
        for name, images in (("float", reference), ("quantized", quantized)):
            samples[name] = torch.cat([samples[name], images.cpu()])[:SHOWN]

    def on_test_epoch_end(self) -> None:
        """Log all metrics over all ranks."""
        for name, value in self.metrics.compute().items():
            self.log(f"test/{name}", value)
        accumulated, single = self.trajectory_errors()
        self.log("test/error_end", float(accumulated[-1]))
        timesteps = list(sampler_for(self.parts, self.quantization.settings).timesteps)
        curves = {"accumulated": {"quantized": accumulated}, "single_step": {"quantized": single}}
        self.generation_report.update(curves, timesteps=timesteps)
        if self.calibration is not None and self.calibration.sweep:
            self.generation_report.update(sweep=self.calibration.sweep, chosen=self.calibration.window)

    # -- predict ------------------------------------------------------------------------------------------------------

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of image numbers, which Lightning divides among ranks."""
        numbers = list(range(FIRST_GENERATED, FIRST_GENERATED + self.images))
        return DataLoader(numbers, batch_size=self.image_batch_size)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        """Refuse an image folder that is not writable on some rank."""
        super().on_predict_start()
        if (folder := self.image_folder) is not None:
            on_all_ranks(lambda: check_writable(user_path(folder)), self.device, "write to image_folder")

    def predict_step(self, batch: Tensor, batch_idx: int) -> GeneratedImages:
        """Generate images (n, C, H, W) in [0, 1] with their numbers, and write them to ``image_folder`` if given."""
        images = self.generate(batch)
        if self.image_folder is not None:
            write_images(self.image_folder, batch - FIRST_GENERATED, images)
        return {"ids": batch - FIRST_GENERATED, "images": images}

    def generate(self, ids: Tensor) -> Tensor:
        """Generate the images (n, C, H, W) in [0, 1] of some numbers with the network in its current state."""
        settings, parts = self.quantization.settings, self.parts
        return generate_images(
            self.model, parts, sampler_for(parts, settings), ids.tolist(), settings.seed, self.device
        )
