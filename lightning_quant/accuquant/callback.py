"""AccuQuant as a Lightning callback that calibrates before the first evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from torch import nn

from lightning_quant.accuquant.calibration import Calibration
from lightning_quant.accuquant.denoiser import SUPPORTED as DENOISERS
from lightning_quant.accuquant.denoiser import Conditioning, Denoiser, check_denoiser
from lightning_quant.accuquant.plan import compared
from lightning_quant.accuquant.preparation import Parts, start
from lightning_quant.accuquant.samplers import SUPPORTED
from lightning_quant.accuquant.settings import ActivationParameters, Learn, Settings, Start
from lightning_quant.accuquant.summary import summarize
from lightning_quant.accuquant.windows import Adjoint
from lightning_quant.calibration.callback import CalibratingCallback
from lightning_quant.calibration.settings import settings_of_arguments
from lightning_quant.calibration.state_file import StateFile
from lightning_quant.errors import ConfigurationError
from lightning_quant.nn.structure import weights_hash
from lightning_quant.utilities.paths import user_path


class AccuQuant(CalibratingCallback):
    """Callback that quantizes a diffusion model's denoiser, calibrated on the error accumulated over sampling steps.

    Before the first ``validate``, ``test`` or ``predict`` it samples float trajectories from the model itself, and
    learns the rounding of weights and the ranges of activations over windows of consecutive steps. ``fit`` stays in
    float. Products are simulated in floating point.

    Source: Lee et al., "AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models", NeurIPS 2025
    (arXiv 2510.20348).

    Args:
        weight_bits: Bit-width of the weights, 2 to 16; asymmetric, with one range per output channel.
        activation_bits: Bit-width of layer inputs and of query, key and value, 2 to 16; one range per tensor.
        steps: Number of sampling steps.
        window: Number of steps in a window; None takes a twentieth to a tenth of the steps, "sweep" tries several.
        adjoint: Gradient over a window: "identity" (AccuQuant), "coefficient", "exact", "bptt", which needs the memory
            of the whole window, or "per_step", which starts each step at the float state, as earlier methods do.
        start: First state of a window: the "float" state, or the one that the calibrated "prefix" reaches.
        activation_parameters: Ranges of activations: "shared" by all steps, or one "per_group" of steps; a group is a
            window.
        learn: Parameters to learn: "all", the "rounding" of weights, or the ranges of "activations".
        weight_scales: Learn the step sizes of weights too.
        updates: Maximum number of Adam updates. Stops early when the held-out error stops falling; the best state is
            kept.
        batch_size: Number of trajectories in an update, over all ranks.
        trajectories: Number of float trajectories to learn from.
        held_out: Number of further trajectories, on whose final error the best state is chosen.
        reconstruction: Number of AdaRound iterations on each block before the updates; 0 skips them.
        rounding_lr: Learning rate of the rounding variables.
        activation_lr: Learning rate of the logarithms of step sizes.
        check_every: Number of updates between two measurements of the held-out error.
        patience: Number of measurements without improvement before the updates stop.
        first_and_last_bits: Bit-width of the layers that take in the sample and that return the output, 2 to 16.
        softmax_bits: Bit-width of the attention's softmax, 2 to 16.
        eta: DDIM's eta: 0 is deterministic, 1 is as noisy as DDPM.
        guidance: Scale of classifier-free guidance, with both branches in one batch; None disables it.
        exclude: Fnmatch patterns of the names of modules to leave in float, with all submodules.
        seed: Seed of the noise and of the batches.
        denoiser: Attribute path of the denoiser in the module, such as "model.unet"; None searches for it.
        scheduler: Attribute path of the scheduler in the module; None searches for it.
        sample_shape: Shape (C, H, W) of a state; None reads it from the denoiser's config.
        cache_dir: Folder of the float trajectories and calibration states, from which an interrupted calibration
            resumes and a finished one is reused; None is ``accuquant`` in the Trainer's ``default_root_dir``.

    Raises:
        ConfigurationError: Argument out of range; one that does not fit the model is refused when the Trainer starts.
        UnsupportedModelError: Denoiser or scheduler that is not supported.

    Example:
        >>> callback = AccuQuant(4, 8, steps=20, window=4)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    callback_name: ClassVar[str] = "AccuQuant"

    calibration: Calibration | None

    def __init__(
        self,
        weight_bits: int = 4,
        activation_bits: int = 8,
        steps: int = 50,
        window: int | Literal["sweep"] | None = None,
        adjoint: Adjoint = "identity",
        start: Start = "float",
        activation_parameters: ActivationParameters = "shared",
        learn: Learn = "all",
        weight_scales: bool = False,
        updates: int = 300,
        batch_size: int = 8,
        trajectories: int = 256,
        held_out: int = 32,
        reconstruction: int = 0,
        rounding_lr: float = 3e-3,
        activation_lr: float = 3e-4,
        check_every: int = 20,
        patience: int = 5,
        first_and_last_bits: int = 8,
        softmax_bits: int = 8,
        eta: float = 0.0,
        guidance: float | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
        denoiser: str | None = None,
        scheduler: str | None = None,
        sample_shape: Sequence[int] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        arguments = locals()
        super().__init__()
        self.settings = settings_of_arguments(Settings, arguments)
        self.denoiser, self.scheduler = denoiser, scheduler
        self.sample_shape = None if sample_shape is None else tuple(sample_shape)
        self.cache_dir = None if cache_dir is None else user_path(cache_dir)

    # -- override points ----------------------------------------------------------------------------------------------

    def make_denoiser(self, pl_module: pl.LightningModule, network: nn.Module) -> Denoiser:
        """Return the denoiser that samplers call; override it to change the call."""
        return Denoiser(network, self.settings.guidance)

    def conditioning(self, pl_module: pl.LightningModule, ids: Sequence[int]) -> Conditioning:
        """Return the denoiser's conditioning, one row per image; override it for conditional models."""
        return {}

    # -- the model ----------------------------------------------------------------------------------------------------

    def parts(self, pl_module: pl.LightningModule) -> Parts:
        """Find the denoiser, the scheduler and the state shape of a module.

        Raises:
            ConfigurationError: No or several denoisers or schedulers, or an attribute path that does not exist.
            UnsupportedModelError: Denoiser or scheduler of an unsupported class.
        """
        network = _attribute(pl_module, self.denoiser, "denoiser") if self.denoiser else _denoiser_of(pl_module)
        scheduler = _attribute(pl_module, self.scheduler, "scheduler") if self.scheduler else _scheduler_of(pl_module)
        return Parts(
            self.make_denoiser(pl_module, network),
            scheduler,
            self.sample_shape or _shape_of(network),
            lambda ids: self.conditioning(pl_module, ids),
        )

    # -- calibration --------------------------------------------------------------------------------------------------

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse modules whose denoiser or scheduler is missing or not supported."""
        self.parts(pl_module)

    def compared(self, pl_module: pl.LightningModule) -> Iterable[tuple[str, object, object]]:
        """Compare bits."""
        return compared(pl_module, self.settings)

    def start_calibration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Calibration:
        """Generate the float trajectories and prepare the denoiser."""
        return self.start(trainer, self.parts(pl_module))

    def summarize(self, calibration: Calibration, seconds: float | None = None) -> str:
        """Summarize the window and the errors before and after the calibration."""
        return summarize(calibration, seconds)

    def start(self, trainer: pl.Trainer, parts: Parts) -> Calibration:
        """Print plan and estimate, generate the float trajectories, and prepare the denoiser."""
        return start(trainer, parts, self.settings, self.cache_dir)

    def state_file(self, trainer: pl.Trainer, calibration: Calibration) -> StateFile:
        """Return the file that the calibration is saved to and resumed from."""
        weights = weights_hash(calibration.source.network)
        return StateFile(trainer, self.cache_dir, "accuquant", calibration.fingerprint(), weights)


def _attribute(pl_module: pl.LightningModule, path: str, argument: str) -> Any:
    try:
        return attrgetter(path)(pl_module)
    except AttributeError as error:
        raise ConfigurationError(
            f"{argument}={path!r}: {type(pl_module).__name__} has no such attribute ({error}). Write the attribute's"
            f" path in the module, for example {argument}='unet'."
        ) from error


def _denoiser_of(pl_module: pl.LightningModule) -> nn.Module:
    denoisers: dict[str, nn.Module] = {
        name: child for name, child in pl_module.named_modules() if type(child).__name__ in DENOISERS
    }
    if len(denoisers) == 1:
        return next(iter(denoisers.values()))
    what = f"several denoisers: {', '.join(denoisers)}" if denoisers else "no denoiser of diffusers"
    example = next(iter(denoisers), "unet")
    raise ConfigurationError(f"{type(pl_module).__name__} has {what}. Write AccuQuant(denoiser={example!r}, ...).")


def _scheduler_of(pl_module: pl.LightningModule) -> Any:
    schedulers = {name: value for name, value in vars(pl_module).items() if type(value).__name__.endswith("Scheduler")}
    diffusers = {n: v for n, v in schedulers.items() if type(v).__module__.startswith("diffusers.")}
    if len(diffusers) == 1:
        return next(iter(diffusers.values()))
    what = f"several schedulers: {', '.join(diffusers)}" if diffusers else "no scheduler of diffusers as an attribute"
    example = next(iter(diffusers), "noise_scheduler")
    raise ConfigurationError(
        f"{type(pl_module).__name__} has {what}. Write AccuQuant(scheduler={example!r}, ...) with the path of a"
        f" {', '.join(SUPPORTED)}."
    )


def _shape_of(network: nn.Module) -> tuple[int, ...]:
    check_denoiser(network)
    config: Any = getattr(network, "config", None)
    size = None if config is None else getattr(config, "sample_size", None)
    if size is None:
        raise ConfigurationError(
            f"The {type(network).__name__} has no config.sample_size: write AccuQuant(sample_shape=(3, 32, 32), ...),"
            " the channels, height and width of a state."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.in_channels), int(height), int(width)
