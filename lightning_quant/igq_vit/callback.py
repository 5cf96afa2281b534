"""IGQ-ViT as a Lightning callback: what is evaluated is calibrated first."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_quant.calibration.callback import CalibratingCallback
from lightning_quant.calibration.image_source import CalibrationData, CalibrationSource, from_trainer
from lightning_quant.calibration.images import calibration_images
from lightning_quant.calibration.settings import settings_of_arguments
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.calibration.step_images import StepImages
from lightning_quant.igq_vit.calibration import Calibration, Source
from lightning_quant.igq_vit.perturbation import log_posteriors
from lightning_quant.igq_vit.plan import compared
from lightning_quant.igq_vit.preparation import prepare
from lightning_quant.igq_vit.settings import GroupRanges, LayerRange, Scheme, Settings
from lightning_quant.igq_vit.summary import estimate, summarize, units
from lightning_quant.nn.agreement import check_weights_agree
from lightning_quant.nn.attention_check import check_attentions, find_attentions
from lightning_quant.nn.structure import weights_hash
from lightning_quant.utilities.distributed import gather, on_all_ranks
from lightning_quant.utilities.hashing import fingerprint
from lightning_quant.utilities.paths import user_path

# One image alone takes longer than its share of a batch.
TIMED_IMAGES = 8


class IGQViT(CalibratingCallback):
    """Evaluate a vision transformer quantized, its activation channels regrouped for each image.

    Before the first ``validate``, ``test`` or ``predict`` it calibrates on unlabelled images of the user's own train
    split; ``fit`` stays in float. Products are simulated in floating point.

    Source: Moon et al., "Instance-Aware Group Quantization for Vision Transformers", CVPR 2024 (arXiv 2404.00928).

    Args:
        weight_bits: 2..16, of all weights, one range for each output channel.
        activation_bits: 2..16, of the inputs of fully connected layers, of Q, K, V and of the softmax.
        groups: quantizers that the channels of an input are divided among, or their average with ``allocate``.
        softmax_groups: of the rows of a softmax; None takes ``groups``.
        allocate: find the number of groups of each layer under the budget of bit operations of ``groups`` everywhere;
            False, the same number in every layer, calibrates several times faster.
        budget: another budget, in giga bit operations of all that is quantized, an image.
        calibration_images: how many, over all ranks.
        literal_zero_point: clip zero points to the codes as the paper writes it, which moves ranges of one sign to 0.
        scheme: "igq", or to compare with: "layer_wise", "per_token", "repq" (a range for each channel after a
            LayerNorm, reparameterized), "upper_bound" (each channel and row of each image its own).
        group_ranges: range of a group: "mean" of its channels' (the paper), "envelope" of them, or "searched" between
            both for the least error.
        layer_range: where one range serves a whole tensor: "percentile", by least error, or "min_max".
        sequential: calibrate each layer on inputs that are already quantized upstream; False on float inputs.
        exclude: Fnmatch patterns of the names of modules to leave in float, with all below them.
        seed: of the draw of calibration images.
        calibration_data: Dataset or DataLoader with batches as the Trainer's, or images (N, C, H, W) as the network
            takes them, in place of the Trainer's train split.
        images: Function from a batch, as the module's steps get it, to its images (N, C, H, W). None asks the module:
            what its own step passes to its network is the image.
        cache_dir: folder of the state of calibrations, by which a stopped one goes on and a finished one is not
            repeated; None is ``igq_vit`` in the Trainer's ``default_root_dir``.

    Raises:
        ConfigurationError: an argument out of its range; for layers and images when the Trainer starts.
        UnsupportedModelError: a network without attention, or with one that is not known.

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
        # Of any result: in a config file a function without annotations is refused else.
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
        """The forward that is calibrated, of images (n, C, H, W): the module's, or that of the part its step calls."""
        return pl_module.get_submodule(self._network)(images)

    def log_posteriors(self, outputs: Any) -> Tensor:
        """Log-probabilities (items, classes) of what :meth:`run` returns, for ``allocate``; gradients make it fast."""
        return log_posteriors(outputs)

    # -- calibration ------------------------------------------------------------------------------------------------

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse attentions that are not known."""
        check_attentions(pl_module, self.settings.exclude)

    def compared(self, pl_module: pl.LightningModule) -> Iterable[tuple[str, object, object]]:
        """Compare scheme, bits and groups."""
        return compared(pl_module, self.settings)

    @torch.no_grad()
    def calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All steps that are left."""
        super().calibrate(trainer, pl_module)

    def start_calibration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Calibration:
        """Draw the images and prepare the module."""
        source = partial(from_trainer, trainer, pl_module, self.calibration_data)
        asked = StepImages(trainer, pl_module, [name for name, _ in find_attentions(pl_module)])
        images = self.draw(trainer, source, asked)
        self._network = asked.network
        return self.start(trainer, pl_module, images)

    def units(self, calibration: Calibration) -> int:
        """The modules of the first step, and the steps after it."""
        return units(calibration)

    def summarize(self, calibration: Calibration, seconds: float | None = None) -> str:
        """Groups and bit operations."""
        return summarize(calibration, seconds)

    def draw(
        self, trainer: pl.Trainer, source: Callable[[], CalibrationSource], guess: Callable[[Any], Tensor] | None = None
    ) -> Tensor:
        """This rank's calibration images, as soon as all ranks have theirs.

        Args:
            trainer: Of the run.
            source: Finds where they come from.
            guess: From a batch to its images, where the callback has no ``images``; None looks where data sets
                commonly have them.
        """
        count, seed = self.settings.calibration_images, self.settings.seed

        def own() -> Tensor:
            rank, ranks = trainer.global_rank, trainer.world_size
            return calibration_images(source(), count, seed, rank, ranks, self.images or guess)

        return on_all_ranks(own, trainer.strategy.root_device, "draw their calibration images")

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor) -> Calibration:
        """Prepare the module and print plan and estimate; ``images`` are this rank's."""
        check_weights_agree(pl_module)
        found = images_hash(images, pl_module.device)
        images = images.to(pl_module.device)
        context = trainer.precision_plugin.forward_context

        def forward(batch: Tensor) -> Any:
            with context():
                return self.run(pl_module, trainer.precision_plugin.convert_input(batch))

        few = images[:TIMED_IMAGES]
        training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            plan = prepare(pl_module, self.settings, images[:1], forward)
            begin = time.perf_counter()
            forward(few)
            seconds = (time.perf_counter() - begin) / len(few)
        # With the layers that are new.
        pl_module.train(training)
        rank_zero_info(f"{plan}\n{estimate(plan, seconds, len(images))}")
        return Calibration(Source(pl_module, plan, forward, images, self.log_posteriors, found))

    def state_file(self, trainer: pl.Trainer, calibration: Calibration) -> StateFile:
        """Where the calibration is written to, and taken from."""
        return state_file(trainer, self.cache_dir, calibration)


def state_file(trainer: pl.Trainer, folder: Path | None, calibration: Calibration) -> StateFile:
    """The file of a prepared calibration.

    Args:
        trainer: says which rank writes and where.
        folder: None is ``igq_vit`` in ``default_root_dir``.
        calibration: to save and load.
    """
    source = calibration.source
    # "repq" changes weights, and has one step: there is nothing to go on from.
    active = source.plan.settings.scheme != "repq"
    parts = calibration.fingerprint(), weights_hash(source.network)
    return StateFile(trainer, folder, "igq_vit", *parts, active=active)


def images_hash(images: Tensor, device: torch.device) -> str:
    """SHA-256 over the calibration images of all ranks, the same however they are divided.

    Args:
        images: this rank's.
        device: where ranks exchange tensors.
    """
    own = torch.tensor([list(bytes.fromhex(fingerprint(image))) for image in images], device=device)
    return hashlib.sha256(repr(sorted(gather(own).tolist())).encode()).hexdigest()
