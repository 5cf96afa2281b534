"""Report section of AccuQuant: errors along the trajectory, and the pictures at the end of a test."""

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
from lightning_quant.report.plotting import Values
from lightning_quant.report.remedies import Finding, Remedy, Settings
from lightning_quant.report.section import Section
from lightning_quant.report.windows import draw_window_sweep
from lightning_quant.utilities.paths import check_on_first_rank, check_writable, user_path

# Ratio of the final error to that of a single step above which errors accumulate, so that longer windows help.
_PILES_UP = 3.0
TITLES = {
    "images.png": "Images from the same seeds",
    "error_curves.png": "Error over the denoising steps",
    "window_sweep.png": "Final error over the window length",
}
FLOAT = "float"
"""Name of the float model's images among those of a report."""


class GenerationReport(TypedDict, total=False):
    """Results of a test of a diffusion model. All keys may be missing.

    Attributes:
        images: Images (n, channels, height, width) with values from 0 to 1, keyed by the name of the model; "float" is
            the float model.
        ids: Number of each image, (n,).
        accumulated: RMSE (N + 1,) or (runs, N + 1), keyed by name, if each model continues from its own states.
        single_step: RMSE, keyed by name, if each step starts from the float state.
        timesteps: Timestep of each network call, (N,).
        sweep: Final errors, keyed by window length.
        chosen: Chosen window length.
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
    """Protocol of modules and callbacks that hold the results of a test of a diffusion model."""

    generation_report: GenerationReport


class GenerationPictures(pl.Callback):
    """Callback that draws ``images.png``, ``error_curves.png`` and ``window_sweep.png`` after a diffusion model's test.

    The module or another callback holds the results to draw in its attribute ``generation_report``, a
    :class:`GenerationReport`.

    Args:
        folder: Folder of the pictures. None takes the logger's folder, or the Trainer's ``default_root_dir`` without a
            logger.
        images: Maximum number of images to draw per model.
        amplify: Factor of the difference to the float images, drawn below each row; None draws no difference.

    Raises:
        ConfigurationError: Fewer than one image.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GenerationPictures("pictures")], logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path | None = None, images: int = 8, amplify: float | None = 4.0) -> None:
        if images < 1:
            raise ConfigurationError(f"images={images}: expected at least one.")
        self.folder = None if folder is None else user_path(folder)
        self.images, self.amplify = images, amplify

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise an error if the folder cannot be written to."""
        if stage == "test":
            check_on_first_rank(trainer, partial(check_writable, report_folder(trainer, self.folder)))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the results of the module or of a callback."""
        # On all ranks, since the logger's folder is broadcast.
        folder = report_folder(trainer, self.folder)
        if not trainer.is_global_zero:
            return
        holders: list[object] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        reports = [holder.generation_report for holder in holders if isinstance(holder, Generating)]
        report = next(filter(None, reports), None)
        written = [] if report is None else draw_generation(report, folder, self.images, self.amplify)
        if written:
            rank_zero_info(f"Pictures of the generation: {', '.join(map(str, written))}")
        else:
            rank_zero_warn(
                f"GenerationPictures drew nothing: after the test, {type(pl_module).__name__}.generation_report has"
                " none of the keys images, accumulated and sweep."
            )


def draw_generation(
    report: GenerationReport, folder: str | Path, images: int = 8, amplify: float | None = None
) -> list[Path]:
    """Draw ``images.png``, ``error_curves.png`` and ``window_sweep.png``, as far as a report has their data.

    Args:
        report: Results of a test.
        folder: Folder of the pictures.
        images: Maximum number of images to draw per model.
        amplify: Factor of the difference to the float images; None draws no difference.

    Returns:
        Written files.

    Raises:
        ConfigurationError: Images without those of the float model, or data that a picture refuses.

    Example:
        >>> draw_generation({}, Path("pictures"))
        []
    """
    folder, written = user_path(folder), []
    pictures = {name: generated[:images] for name, generated in (report.get("images") or {}).items()}
    if pictures and FLOAT not in pictures:
        raise ConfigurationError(
            f"Images of {', '.join(pictures)}, but none of the float model to compare with: add '{FLOAT}'."
        )
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
    """Section of AccuQuant: errors over the denoising steps, windows, and generated images.

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
        """Results of the test, completed with those of the calibration."""
        curves = {"accumulated": staged(self.record, "error/"), "single_step": staged(self.record, "single_step/")}
        results: dict[str, Any] = {
            kind: {STAGES[stage]: values for stage, values in by_stage.items()}
            for kind, by_stage in curves.items()
            if by_stage
        }
        # Curves of the test may belong to other timesteps.
        if "timesteps" in self.record and "accumulated" not in self.generated:
            results["timesteps"] = self.record["timesteps"].tolist()
        if sweep := numbered(self.record, "sweep/"):
            results["sweep"] = {length: float(error) for length, error in sweep.items()}
            results["chosen"] = min(results["sweep"], key=results["sweep"].__getitem__)
        return cast(GenerationReport, {**results, **self.generated})

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        return {TITLES[path.name]: path for path in draw_generation(self._report, folder)}

    def figures(self) -> Mapping[str, Any]:
        report = self._report
        figures: dict[str, Any] = {
            kind: {name: values.tolist() for name, values in report[kind].items()}  # type: ignore[literal-required]
            for kind in ("accumulated", "single_step")
            if kind in report
        }
        if "window" in self.record:
            figures["window"] = int(self.record["window"])
            figures["held_out_errors"] = {k: values.tolist() for k, values in staged(self.record, "error/").items()}
        return figures

    def advice(self) -> Iterable[Finding]:
        accumulated, single = self._report.get("accumulated"), self._report.get("single_step")
        if not accumulated or not single:
            return
        # The last stage with both errors, which for an unfinished calibration is that of the initial ranges.
        stage = [name for name in accumulated if name in single][-1:]
        if not stage:
            return
        end, step = float(accumulated[stage[0]][-1]), float(single[stage[0]].mean())
        if step > 0 and end > _PILES_UP * step:
            settings, remedies_to_try = settings_of(self.record), ["more updates"]
            if not settings.get("reconstruction"):
                remedies_to_try.insert(0, "reconstruction=100 before the windows")
            longest = "window" in self.record and int(self.record["window"]) >= len(self.record["timesteps"])
            if settings.get("window") != "sweep" and not longest:
                remedies_to_try.insert(0, "a longer window (window='sweep' finds one)")
            yield Finding(
                f"The final error is {end / step:.0f} times that of a single step: errors accumulate.",
                f"Try {', or '.join(remedies_to_try)}.",
            )

    @property
    def settings(self) -> Settings:
        return settings_of(self.record)

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        return remedies.of_windows(cause, layer, self.settings)
