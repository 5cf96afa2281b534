"""IGQ-ViT as a Lightning callback that calibrates before the first evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_quant.calibration.callback import CalibratingCallback
from lightning_quant.calibration.image_source import CalibrationData, CalibrationSource, from_trainer
from lightning_quant.calibration.images import calibration_images
from lightning_quant.calibration.settings import settings_of_arguments
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.calibration.step_images import StepImages
from lightning_quant.igq_vit.calibration import Calibration
from lightning_quant.igq_vit.perturbation import log_posteriors
from lightning_quant.igq_vit.plan import compared
from lightning_quant.igq_vit.preparation import start
from lightning_quant.igq_vit.settings import GroupRanges, LayerRange, Scheme, Settings
from lightning_quant.igq_vit.summary import summarize, units
from lightning_quant.nn.attention_check import check_attentions, find_attentions
from lightning_quant.nn.structure import weights_hash
from lightning_quant.utilities.distributed import on_all_ranks
from lightning_quant.utilities.paths import user_path


class IGQViT(CalibratingCallback):
    """Callback that quantizes a vision transformer for evaluation, with channel groups chosen for each image.

    It calibrates before the first ``validate``, ``test`` or ``predict``, on unlabeled images of the user's train split.
    ``fit`` runs in float. Products are simulated in floating point.

    Source: Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024 (arXiv 2404.00928).

    Args:
        weight_bits: Bit-width of the weights, 2 to 16; one range per output channel.
        activation_bits: Bit-width of the inputs of fully connected layers, of query, key and value, and of the softmax,
            2 to 16.
        groups: Number of groups, each with its own quantizer, that the channels of a layer's input are divided into;
            their average over the layers with ``allocate``.
        softmax_groups: Number of groups of the rows of a softmax; None takes ``groups``.
        allocate: Whether to choose the number of groups of each layer, within the bit operations that ``groups``
            everywhere would cost. False uses ``groups`` in every layer and calibrates several times faster.
        budget: Budget in giga bit operations per image over all quantized modules, in place of that of ``groups``.
        calibration_images: Number of calibration images over all ranks.
        literal_zero_point: Whether to clip zero points to the codes, as in the paper, which moves ranges of one sign
            to 0.
        scheme: Quantization scheme: "igq", or one of the baselines "layer_wise", "per_token", "repq" (one range per
            channel after a LayerNorm, reparameterized) and "upper_bound" (one range per channel and per softmax row of
            each image).
        group_ranges: Range of a group: the "mean" of its channels' ranges (the paper), their "envelope", or one
            "searched" in between for the smallest error.
        layer_range: Range of a tensor with a single range: the "percentile" with the smallest error, or "min_max".
        sequential: Whether to calibrate each layer on inputs that are already quantized upstream; False uses float
            inputs.
        exclude: Fnmatch patterns of the names of modules to leave in float, with all submodules.
        seed: Seed for sampling the calibration images.
        calibration_data: Dataset or DataLoader with batches like the Trainer's, or images (N, C, H, W) as the network
            takes them, to use instead of the Trainer's train split.
        images: Function that returns the images (N, C, H, W) of a batch, as the module's steps get it. None takes what
            the module's own step passes to its network.
        cache_dir: Folder of the calibration states, from which an interrupted calibration resumes and a finished one is
            reused; None is ``igq_vit`` in the Trainer's ``default_root_dir``.

    Raises:
        ConfigurationError: Argument out of range; one that does not fit the layers or the images is refused when the
            Trainer starts.
        UnsupportedModelError: Network without attention, or with an unknown one; refused when the Trainer starts.

    Example:
        >>> callback = IGQViT(4, 4, groups=8)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    callback_name: ClassVar[str] = "IGQViT"

    calibration: Calibration | None

    def __init__(
        self,
        weight_bits: int = 4,
        activation_bits: int = 4,
        groups: int = 8,
        softmax_groups: int | None = None,
        allocate: bool = True,
        budget: float | None = None,
        calibration_images: int = 32,
        literal_zero_point: bool = False,
        scheme: Scheme = "igq",
        group_ranges: GroupRanges = "searched",
        layer_range: LayerRange = "percentile",
        sequential: bool = True,
        exclude: Sequence[str] = (),
        seed: int = 0,
        calibration_data: CalibrationData | None = None,
        cache_dir: str | Path | None = None,
        # Any: config files would otherwise refuse a function without annotations.
        images: Callable[[Any], Any] | None = None,
    ) -> None:
        arguments = locals()
        super().__init__()
        self.settings = settings_of_arguments(Settings, arguments)
        self.calibration_data = calibration_data
        self.cache_dir = None if cache_dir is None else user_path(cache_dir)
        self.images = images
        self._network = ""

    # -- override points ------------------------------------------------------------------------------------------

    def run(self, pl_module: pl.LightningModule, images: Tensor) -> Any:
        """Run the forward to calibrate on images (n, C, H, W): the module's, or that of the part its step calls."""
        return pl_module.get_submodule(self._network)(images)

    def log_posteriors(self, outputs: Any) -> Tensor:
        """Return log-probabilities (items, classes) of the outputs of :meth:`run`, for ``allocate``.

        Calibration is several times faster if gradients flow through them.
        """
        return log_posteriors(outputs)

    # -- calibration ------------------------------------------------------------------------------------------------

    def check(self, pl_module: pl.LightningModule) -> None:
        """Raise an error if the module has no attention, or an unknown one."""
        check_attentions(pl_module, self.settings.exclude)

    def compared(self, pl_module: pl.LightningModule) -> Iterable[tuple[str, object, object]]:
        """Yield scheme, bit-widths and groups, each as in the module and as in the settings."""
        return compared(pl_module, self.settings)

    @torch.no_grad()
    def calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run all remaining steps without gradients."""
        super().calibrate(trainer, pl_module)

    def start_calibration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Calibration:
        """Sample the images and prepare the module."""
        source = partial(from_trainer, trainer, pl_module, self.calibration_data)
        step_images = StepImages(trainer, pl_module, [name for name, _ in find_attentions(pl_module)])
        images = self.draw(trainer, source, step_images)
        self._network = step_images.network
        return self.start(trainer, pl_module, images)

    def units(self, calibration: Calibration) -> int:
        """Count the modules of the first step and the steps after it."""
        return units(calibration)

    def summarize(self, calibration: Calibration, seconds: float | None = None) -> str:
        """Summarize groups and bit operations."""
        return summarize(calibration, seconds)

    def draw(
        self, trainer: pl.Trainer, source: Callable[[], CalibrationSource], guess: Callable[[Any], Tensor] | None = None
    ) -> Tensor:
        """Return this rank's calibration images, once all ranks have theirs.

        Args:
            trainer: Trainer of the run.
            source: Function that returns the source of the images.
            guess: Function that returns the images of a batch if the callback has no ``images``; None looks where data
                sets commonly have them.
        """
        count, seed = self.settings.calibration_images, self.settings.seed

        def rank_images() -> Tensor:
            rank, ranks = trainer.global_rank, trainer.world_size
            return calibration_images(source(), count, seed, rank, ranks, self.images or guess)

        return on_all_ranks(rank_images, trainer.strategy.root_device, "draw their calibration images")

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor) -> Calibration:
        """Prepare the module, print plan and estimate, and return the calibration on this rank's ``images``."""
        context = trainer.precision_plugin.forward_context

        def forward(batch: Tensor) -> Any:
            with context():
                return self.run(pl_module, trainer.precision_plugin.convert_input(batch))

        return start(pl_module, self.settings, images, forward, self.log_posteriors)

    def state_file(self, trainer: pl.Trainer, calibration: Calibration) -> StateFile:
        """Return the file that the calibration is saved to and resumed from."""
        source = calibration.source
        # "repq" changes weights and has a single step: there is nothing to resume from.
        active = self.settings.scheme != "repq"
        parts = calibration.fingerprint(), weights_hash(source.network)
        return StateFile(trainer, self.cache_dir, "igq_vit", *parts, active=active)
