"""AccuQuant as a LightningModule around a diffusion pipeline: fit calibrates, then it measures and generates."""

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

# Generated images are others than those that it was calibrated on.
FIRST_GENERATED = 1_000_000
# Images that a report shows.
SHOWN = 16


class AccuQuantModule(CalibratingModule):
    """A diffusion model of diffusers whose ``fit`` calibrates it; then it measures and generates.

    ``fit`` (``lightning-quant calibrate``) is the calibration, a step of which is a training step; ``validate``
    measures the error that piles up over held-out trajectories; ``test`` generates images with the float and the
    quantized denoiser from the same seeds and compares them; ``predict`` generates images in batches over all ranks. An
    image depends on its number and the seed alone.

    Source: Lee et al., "AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models", NeurIPS 2025
    (arXiv 2510.20348).

    Args:
        model: folder of a pipeline of diffusers or name on the hub: DDPM, DDIM, LDM, Stable Diffusion, DiT, see
            :func:`~lightning_quant.accuquant.pipelines.load_float_pipeline`; or a pipeline object.
        scheduler: folder of a scheduler in place of the pipeline's.
        class_embedding: file of a class-conditional LDM's table of classes.
        prompts: file with one prompt a line, for text-to-image; or a safetensors file, see
            :func:`~lightning_quant.accuquant.text_encoding.read_embeddings`.
        classes: number of classes to draw from; None takes the model's.
        images: how many ``test`` and ``predict`` make.
        image_batch_size: at once, on one rank.
        image_folder: where ``predict`` writes PNG files named by their numbers; None writes none.
        real_images: folder of images of the data, for FID.
        metrics: what ``test`` measures, as the arguments of :class:`lightning_quant.GenerationMetrics` or itself.
        quantization: the arguments of the calibration, as the callback's or as a mapping of them.

    Raises:
        ConfigurationError, UnsupportedModelError, CheckpointError: see ``load_float_pipeline`` and
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
        # In a tuple, or the autoencoder would be part of the checkpoint.
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
        """The pipeline: its denoiser is :attr:`network`."""
        return self._model[0]

    @property
    def parts(self) -> Parts:
        """What the calibration sees of it."""
        denoiser = self.model.denoiser(self.quantization.settings.guidance)
        return Parts(denoiser, self.model.scheduler, self.model.sample_shape, self.conditions.rows)

    # -- fit ----------------------------------------------------------------------------------------------------------

    def start_calibration(self) -> Calibration:
        """Make the float trajectories, and prepare the denoiser."""
        return self.quantization.start(self.trainer, self.parts)

    def state_file(self, calibration: Calibration) -> StateFile:
        """As the callback's."""
        return self.quantization.state_file(self.trainer, calibration)

    def after_step(self, calibration: Calibration) -> None:
        """Show the loss, and the held-out error where it was measured anew."""
        if calibration.updates:
            self.log("calibration/loss", calibration.loss, prog_bar=True, rank_zero_only=True)
        if calibration.worth_saving and calibration.errors:
            last = next(reversed(calibration.errors.values()))
            self.log("calibration/held_out_error", float(last[-1]), prog_bar=True, rank_zero_only=True)

    def summarize(self, calibration: Calibration) -> str:
        """What came out."""
        return self.quantization.summarize(calibration)

    # -- validate -----------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> DataLoader[Any]:
        """One batch: the held-out trajectories."""
        return DataLoader([0])  # type: ignore[arg-type]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """RMSE to the float model at the end of held-out trajectories, and in the middle."""
        accumulated, _ = self.trajectory_errors()
        for name, error in (("middle", accumulated[len(accumulated) // 2]), ("end", accumulated[-1])):
            # All ranks have it.
            self.log(f"val/error_{name}", float(error), batch_size=1)

    def trajectory_errors(self) -> tuple[Tensor, Tensor]:
        """Accumulated (steps + 1,) and single-step (steps,) RMSE on the held-out trajectories."""
        parts, settings = self.parts, self.quantization.settings
        sampler, held = sampler_for(parts, settings), image_numbers(settings)[1]
        with torch.inference_mode(False), torch.no_grad():
            with in_float(self.network):
                cache = trajectories(self.trainer, parts, sampler, settings, self.quantization.cache_dir, held)
            own = list(held)[self.trainer.global_rank :: self.trainer.world_size]
            some = cache.trajectories(own) if own else None
            found = [measure(parts.denoiser, sampler, some) for measure in (accumulated_errors, single_step_errors)]
        return found[0], found[1]

    # -- test ---------------------------------------------------------------------------------------------------------

    def test_dataloader(self) -> DataLoader[Any]:
        """Numbers of images."""
        return self.predict_dataloader()

    def on_test_start(self) -> None:
        """Forget earlier images; take in those of the data."""
        super().on_test_start()
        self.metrics.reset()
        self.generation_report = {}
        if self.real_images is not None:
            rank, ranks = self.trainer.global_rank, self.trainer.world_size
            for ids, images in read_images(self.real_images, self.image_batch_size, rank, ranks):
                self.metrics.update_real(images.to(self.device), ids)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """The same images by the float and by the quantized denoiser."""
        with in_float(self.network):
            expected = self.generate(batch)
        found = self.generate(batch)
        self.metrics.update(found, expected, prompts=self.conditions.texts(batch), ids=batch)
        shown = self.generation_report.setdefault("images", {"float": expected[:0].cpu(), "quantized": found[:0].cpu()})
        for name, images in (("float", expected), ("quantized", found)):
            shown[name] = torch.cat([shown[name], images.cpu()])[:SHOWN]

    def on_test_epoch_end(self) -> None:
        """All measures, over all ranks."""
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
        """Numbers of images, which Lightning divides among ranks."""
        numbers = list(range(FIRST_GENERATED, FIRST_GENERATED + self.images))
        return DataLoader(numbers, batch_size=self.image_batch_size)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        """Refuse a folder that a rank cannot write its images to."""
        super().on_predict_start()
        if (folder := self.image_folder) is not None:
            on_all_ranks(lambda: check_writable(user_path(folder)), self.device, "write to image_folder")

    def predict_step(self, batch: Tensor, batch_idx: int) -> GeneratedImages:
        """Images (n, C, H, W) in [0, 1] with their numbers, as files too where a folder is given."""
        images = self.generate(batch)
        if self.image_folder is not None:
            write_images(self.image_folder, batch - FIRST_GENERATED, images)
        return {"ids": batch - FIRST_GENERATED, "images": images}

    def generate(self, ids: Tensor) -> Tensor:
        """Images (n, C, H, W) in [0, 1] of some numbers, by the network as it is."""
        settings, parts = self.quantization.settings, self.parts
        return generate_images(
            self.model, parts, sampler_for(parts, settings), ids.tolist(), settings.seed, self.device
        )
