"""What generation with a quantized model did: errors along the trajectory, and all pictures at the end of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_quant.accuquant.calibration import STAGES, staged
from lightning_quant.analysis import Cause, LayerAnalysis
from lightning_quant.calibration.record import Record, numbered, plan_of, settings_of
from lightning_quant.errors import ConfigurationError
from lightning_quant.report import remedies
from lightning_quant.report.error_curves import draw_error_curves
from lightning_quant.report.html import report_folder
from lightning_quant.report.image_grids import draw_image_pairs
from lightning_quant.report.plotting import (
    Values,
)
from lightning_quant.report.remedies import Finding, Remedy, Settings
from lightning_quant.report.section import Section
from lightning_quant.report.windows import draw_window_sweep
from lightning_quant.utilities.paths import check_on_first_rank, check_writable, user_path

# An error that piles up to more than this many times that of single steps asks for longer windows.
_PILES_UP = 3.0
TITLES = {
    "images.png": "Images from the same seeds",
    "error_curves.png": "Error over the denoising steps",
    "window_sweep.png": "End error over the length of windows",
}
FLOAT = "float"
"""Name of the float model's images among those of a report."""


class GenerationReport(TypedDict, total=False):
    """What a test of a diffusion model found. All keys may be missing.

    Attributes:
        images: (n, channels, height, width) from 0 to 1 by name, with those of the float model as "float".
        ids: (n,), number of each image.
        accumulated: (N + 1,) or (runs, N + 1) RMSE by name, each model on its own states.
        single_step: the same, each step from the float state.
        timesteps: (N,), of each network call.
        sweep: end errors by window length.
        chosen: window length.
    """

    images: Mapping[str, Tensor]
    ids: Sequence[int] | Tensor
    accumulated: Mapping[str, Tensor]
    single_step: Mapping[str, Tensor]
    timesteps: Sequence[int]
    sweep: Mapping[int, Values]
    chosen: int


@runtime_checkable
class Generating(Protocol):
    """A module or callback that holds what a test of a diffusion model found."""

    generation_report: GenerationReport


class GenerationPictures(pl.Callback):
    """Draw ``images.png``, ``error_curves.png`` and ``window_sweep.png`` at the end of a test of a diffusion model.

    The module, or another callback, holds what there is to draw as its attribute ``generation_report``, a
    :class:`GenerationReport`.

    Args:
        folder: where to; None takes the logger's folder, without logger the trainer's ``default_root_dir``.
        images: how many images of each model are drawn at most.
        amplify: factor of the difference to the float images, drawn below each row; None leaves it out.

    Raises:
        ConfigurationError: fewer images than one.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GenerationPictures("pictures")], logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path | None = None, images: int = 8, amplify: float | None = 4.0) -> None:
        if images < 1:
            raise ConfigurationError(f"images={images}: expected at least one.")
        self.folder = None if folder is None else user_path(folder)
        self.images, self.amplify = images, amplify

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written to."""
        if stage == "test":
            check_on_first_rank(trainer, partial(check_writable, report_folder(trainer, self.folder)))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what the module found."""
        # Asked on all ranks: the logger's folder is broadcast.
        folder = report_folder(trainer, self.folder)
        if not trainer.is_global_zero:
            return
        holders: list[object] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        found = [each.generation_report for each in holders if isinstance(each, Generating) and each.generation_report]
        written = draw_generation(found[0], folder, self.images, self.amplify) if found else []
        if written:
            rank_zero_info(f"Pictures of the generation: {', '.join(map(str, written))}")
        else:
            rank_zero_warn(
                f"GenerationPictures drew nothing: after the test, {type(pl_module).__name__}.generation_report holds"
                " none of images, accumulated and sweep."
            )


def draw_generation(
    report: GenerationReport, folder: str | Path, images: int = 8, amplify: float | None = None
) -> list[Path]:
    """Draw what a report has: ``images.png``, ``error_curves.png`` and ``window_sweep.png``.

    Args:
        report: of a test; what is missing is left out.
        folder: for the pictures.
        images: how many images of each model are drawn at most.
        amplify: factor of the difference to the float images; None leaves it out.

    Returns:
        what was written.

    Raises:
        ConfigurationError: images without those of the float model, or what a picture refuses.

    Example:
        >>> draw_generation({}, Path("pictures"))
        []
    """
    folder, written = user_path(folder), []
    pictures = {name: each[:images] for name, each in (report.get("images") or {}).items()}
    if pictures and FLOAT not in pictures:
        raise ConfigurationError(f"Images of {', '.join(pictures)}, but none to compare with: add '{FLOAT}'.")
    if len(pictures) > 1:
        reference, ids = pictures.pop(FLOAT), report.get("ids")
        written.append(folder / "images.png")
        draw_image_pairs(reference, pictures, None if ids is None else ids[:images], path=written[-1], amplify=amplify)
    if accumulated := report.get("accumulated"):
        written.append(folder / "error_curves.png")
        draw_error_curves(accumulated, report.get("single_step"), report.get("timesteps"), written[-1])
    if sweep := report.get("sweep"):
        written.append(folder / "window_sweep.png")
        draw_window_sweep(sweep, written[-1], chosen=report.get("chosen"))
    return written


@dataclass
class WindowSection(Section):
    """AccuQuant: errors over the denoising steps, windows, and generated images.

    Attributes:
        record: Record of the calibration.
        generated: Report of a test that generated images.
    """

    record: Record
    generated: GenerationReport

    @property
    def name(self) -> str:
        return "AccuQuant"

    @property
    def names_are_of_the_denoiser(self) -> bool:
        return True

    @property
    def plan(self) -> str:
        return plan_of(self.record)

    @property
    def _report(self) -> GenerationReport:
        """What a test has found, before what the calibration has."""
        curves = {"accumulated": staged(self.record, "error/"), "single_step": staged(self.record, "single_step/")}
        found: dict[str, Any] = {
            kind: {STAGES[stage]: values for stage, values in each.items()} for kind, each in curves.items() if each
        }
        # Those of another run's curves could be others.
        if "timesteps" in self.record and "accumulated" not in self.generated:
            found["timesteps"] = self.record["timesteps"].tolist()
        if sweep := numbered(self.record, "sweep/"):
            found["sweep"] = {length: float(error) for length, error in sweep.items()}
            found["chosen"] = min(found["sweep"], key=found["sweep"].__getitem__)
        return cast(GenerationReport, {**found, **self.generated})

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        return {TITLES[path.name]: path for path in draw_generation(self._report, folder)}

    def figures(self) -> Mapping[str, Any]:
        report = self._report
        found: dict[str, Any] = {
            kind: {name: values.tolist() for name, values in report[kind].items()}  # type: ignore[literal-required]
            for kind in ("accumulated", "single_step")
            if kind in report
        }
        if "window" in self.record:
            found["window"] = int(self.record["window"])
            found["held_out_errors"] = {k: values.tolist() for k, values in staged(self.record, "error/").items()}
        return found

    def advice(self) -> Iterable[Finding]:
        accumulated, single = self._report.get("accumulated"), self._report.get("single_step")
        if not accumulated or not single:
            return
        # The last stage of which both are known: of a calibration that is not finished, the ranges.
        stage = [name for name in accumulated if name in single][-1:]
        if not stage:
            return
        end, step = float(accumulated[stage[0]][-1]), float(single[stage[0]].mean())
        if step > 0 and end > _PILES_UP * step:
            settings, tries = settings_of(self.record), ["more updates"]
            if not settings.get("reconstruction"):
                tries.insert(0, "reconstruction=100 before the windows")
            longest = "window" in self.record and int(self.record["window"]) >= len(self.record["timesteps"])
            if settings.get("window") != "sweep" and not longest:
                tries.insert(0, "a longer window (window='sweep' finds one)")
            yield Finding(
                f"The error at the end is {end / step:.0f} times that of a single step: it piles up.",
                f"Try {', or '.join(tries)}.",
            )

    @property
    def settings(self) -> Settings:
        return settings_of(self.record)

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        return remedies.of_windows(cause, layer, self.settings)
