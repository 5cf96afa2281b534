"""AccuQuant as a Lightning callback: what is evaluated is calibrated first."""

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
    """Evaluate a diffusion model with a quantized denoiser, calibrated on the error that piles up while it samples.

    Before the first ``validate``, ``test`` or ``predict`` it samples float trajectories from the model itself, and
    learns the rounding of weights and the ranges of activations over windows of consecutive steps; ``fit`` stays in
    float. Products are simulated in floating point.

    Source: Lee et al., "AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models", NeurIPS 2025
    (arXiv 2510.20348).

    Args:
        weight_bits: 2..16, asymmetric, a range for each output channel.
        activation_bits: 2..16, of inputs of layers and of query, key and value, a range for each tensor.
        steps: of the sampler.
        window: steps in a window; None for a tenth to a twentieth of all, "sweep" to try several.
        adjoint: how the gradient goes back over a window: "identity" (AccuQuant), "coefficient", "exact", "bptt" in the
            memory of the whole window, or "per_step", each step from the float state, as methods before.
        start: windows begin at the "float" state, or at the one that the calibrated "prefix" reaches.
        activation_parameters: "shared" by all steps, or "per_group" of steps, a window each.
        learn: "all", only the "rounding" of weights, or only ranges of "activations".
        weight_scales: learn the step sizes of weights too.
        updates: of Adam, at most; the best by held-out error is kept, and it stops where that does not fall.
        batch_size: trajectories in an update, over all ranks.
        trajectories: of the float model, to learn from.
        held_out: further trajectories, by whose end the best is chosen.
        reconstruction: iterations of AdaRound on each block before that; 0 leaves it out.
        rounding_lr: of the rounding variables.
        activation_lr: of the logarithms of step sizes.
        check_every: updates between two looks at the held-out trajectories.
        patience: looks without a gain before it stops.
        first_and_last_bits: of the layers that the sample comes into and goes out of.
        softmax_bits: of the attention's softmax.
        eta: of DDIM.
        guidance: scale of classifier-free guidance, both branches in one batch; None for none.
        exclude: Fnmatch patterns of the names of modules to leave in float, with all below them.
        seed: of noise and draws.
        denoiser: path of the denoiser's attribute, as "model.unet"; None finds it.
        scheduler: path of the scheduler's attribute; None finds it.
        sample_shape: (C, H, W) of a state; None asks the denoiser's config.
        cache_dir: folder of float trajectories and of the state of calibrations, by which a stopped one goes on and a
            finished one is not repeated; None is ``accuquant`` in the Trainer's ``default_root_dir``.

    Raises:
        ConfigurationError: an argument out of its range; for the model when the Trainer starts.
        UnsupportedModelError: a denoiser or scheduler that is not known.

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
        """The denoiser as samplers call it."""
        return Denoiser(network, self.settings.guidance)

    def conditioning(self, pl_module: pl.LightningModule, ids: Sequence[int]) -> Conditioning:
        """What the denoiser is given for the images of some numbers, a row each."""
        return {}

    # -- the model ----------------------------------------------------------------------------------------------------

    def parts(self, pl_module: pl.LightningModule) -> Parts:
        """Denoiser, scheduler and shape of somebody's module.

        Raises:
            ConfigurationError: none or several of them; a path that leads nowhere.
            UnsupportedModelError: of classes that are not known.
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
        """Refuse denoisers and schedulers that are not found, or not known."""
        self.parts(pl_module)

    def compared(self, pl_module: pl.LightningModule) -> Iterable[tuple[str, object, object]]:
        """Compare bits."""
        return compared(pl_module, self.settings)

    def start_calibration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Calibration:
        """Make the float trajectories, and prepare the denoiser."""
        return self.start(trainer, self.parts(pl_module))

    def summarize(self, calibration: Calibration, seconds: float | None = None) -> str:
        """Errors before and after, and the window."""
        return summarize(calibration, seconds)

    def start(self, trainer: pl.Trainer, parts: Parts) -> Calibration:
        """Print plan and estimate, make float trajectories, and prepare the denoiser."""
        return start(trainer, parts, self.settings, self.cache_dir)

    def state_file(self, trainer: pl.Trainer, calibration: Calibration) -> StateFile:
        """Where the calibration is written to, and taken from."""
        weights = weights_hash(calibration.source.network)
        return StateFile(trainer, self.cache_dir, "accuquant", calibration.fingerprint(), weights)


def _attribute(pl_module: pl.LightningModule, path: str, argument: str) -> Any:
    try:
        return attrgetter(path)(pl_module)
    except AttributeError as error:
        raise ConfigurationError(
            f"{argument}={path!r}: {type(pl_module).__name__} has no such attribute ({error}). Write the path from the"
            f" module on, for example {argument}='unet'."
        ) from error


def _denoiser_of(pl_module: pl.LightningModule) -> nn.Module:
    found: dict[str, nn.Module] = {
        name: child for name, child in pl_module.named_modules() if type(child).__name__ in DENOISERS
    }
    if len(found) == 1:
        return next(iter(found.values()))
    what = f"several denoisers: {', '.join(found)}" if found else "no denoiser of diffusers"
    example = next(iter(found), "unet")
    raise ConfigurationError(f"{type(pl_module).__name__} has {what}. Write AccuQuant(denoiser={example!r}, ...).")


def _scheduler_of(pl_module: pl.LightningModule) -> Any:
    known = {name: value for name, value in vars(pl_module).items() if type(value).__name__.endswith("Scheduler")}
    diffusers = {n: v for n, v in known.items() if type(v).__module__.startswith("diffusers.")}
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
            f"The {type(network).__name__} does not say what shape its states have: write"
            " AccuQuant(sample_shape=(3, 32, 32), ...), channels, height, width."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.in_channels), int(height), int(width)
