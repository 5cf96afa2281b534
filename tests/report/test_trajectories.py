"""Errors over the denoising steps, and all pictures of a test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.axes import Axes
from matplotlib.image import imread
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.error_curves import draw_error_curves
from lightning_quant.report.trajectories import GenerationPictures, GenerationReport, draw_generation

RAMP = torch.linspace(0, 1, 11)


def drawn(axes: Axes) -> list[list[float]]:
    """The heights of each line."""
    return [np.asarray(line.get_ydata(), float).tolist() for line in axes.lines]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_lines_are_the_errors_with_the_last_one_written() -> None:
    own, single = draw_error_curves({"a": 1 + RAMP, "b": 2 + RAMP}, {"b": 1.5 + RAMP[1:]}).axes
    np.testing.assert_allclose(drawn(own), [(1 + RAMP).tolist(), (2 + RAMP).tolist()], rtol=1e-6)
    np.testing.assert_allclose(drawn(single), [[np.nan, *(1.5 + RAMP[1:]).tolist()]], rtol=1e-6)
    assert (labels(own), labels(single)) == (["a\n2.00", "b\n3.00"], ["b\n2.50"])
    assert own.lines[1].get_color() == single.lines[0].get_color() != own.lines[0].get_color()
    assert "accumulated" in own.get_title(loc="left")
    assert "single step" in single.get_title(loc="left")
    assert own.get_ylim() == single.get_ylim()
    assert own.get_xlim() == (0, 10)


def test_runs_are_a_mean_and_a_band_over_all_of_them() -> None:
    runs = torch.tensor([[1.0], [2.0], [6.0]]) * (1 + RAMP) / 4
    (axes,) = draw_error_curves({"a": runs}).axes
    np.testing.assert_allclose(drawn(axes), [runs.mean(0).tolist()], rtol=1e-6)
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    at_end = band[band[:, 0] == 10, 1]
    np.testing.assert_allclose([at_end.min(), at_end.max()], [0.5, 3.0], rtol=1e-6)
    assert labels(axes) == ["a\n1.50 (0.500 to 3.00)"]
    assert "3 runs" in axes.get_ylabel()


def test_a_wide_range_is_logarithmic_without_the_noise() -> None:
    (axes,) = draw_error_curves({"a": RAMP**3}).axes
    assert axes.get_yscale() == "log"
    assert np.isnan(drawn(axes)[0]).tolist() == [True] + [False] * 10


def test_a_narrow_range_starts_at_zero() -> None:
    (axes,) = draw_error_curves({"a": torch.tensor([0.0, 1.0, 9.0])}).axes
    assert (axes.get_yscale(), axes.get_ylim()[0]) == ("linear", 0)
    assert drawn(axes) == [[0.0, 1.0, 9.0]]


def test_timesteps_stand_above_the_state_they_are_given_with() -> None:
    calls = torch.arange(950, -1, -50)
    figure = draw_error_curves({"a": torch.linspace(0, 1, 21)}, timesteps=calls)
    (above,) = figure.axes[0].child_axes
    figure.draw_without_rendering()
    ticks = [
        (int(tick), label.get_text()) for tick, label in zip(above.get_xticks(), above.get_xticklabels(), strict=True)
    ]
    assert len(ticks) > 2
    assert ticks == [(step, str(int(calls[step]))) for step, _ in ticks]
    assert not draw_error_curves({"a": RAMP}).axes[0].child_axes


def test_a_method_that_diverged_does_not_hide_the_others() -> None:
    broken = torch.where(RAMP > 0.5, torch.nan, 1 + RAMP)
    (axes,) = draw_error_curves({"broken": broken, "fine": 1 + RAMP}).axes
    assert labels(axes) == ["broken\nnan", "fine\n2.00"]
    assert axes.get_ylim()[1] > 2


@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("methods", [1, 4])
def test_pictures_are_png_files_of_a_readable_size(tmp_path: Path, steps: int, methods: int) -> None:
    errors = {f"method_{i}": torch.rand(3, steps + 1) for i in range(methods)}
    path = tmp_path / "new" / "errors.png"
    draw_error_curves(errors, errors, range(steps), path)
    assert imread(path).shape[:2] == (630, 1680)


def test_errors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(ConfigurationError, match="No error to draw"):
        draw_error_curves({}, path=path)
    with pytest.raises(ConfigurationError, match=r"'b' have shape \(8,\): expected \(11,\) or \(runs, 11\)"):
        draw_error_curves({"a": RAMP, "b": RAMP[:8]}, path=path)
    with pytest.raises(ConfigurationError, match=r"'a' have shape \(1, 1, 11\)"):
        draw_error_curves({"a": RAMP[None, None]}, path=path)
    with pytest.raises(ConfigurationError, match="11 timesteps for errors of 10 steps"):
        draw_error_curves({"a": RAMP}, timesteps=range(11), path=path)
    assert not path.exists()


IMAGES = {"float": torch.rand(12, 1, 8, 8), "identity": torch.rand(12, 1, 8, 8)}
REPORT: GenerationReport = {
    "images": IMAGES,
    "ids": list(range(100, 112)),
    "accumulated": {"identity": RAMP},
    "single_step": {"identity": RAMP / 2},
    "timesteps": list(range(900, -1, -100)),
    "sweep": {1: 0.2, 4: 0.1},
    "chosen": 4,
}
ALL = ["error_curves.png", "images.png", "window_sweep.png"]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (set(REPORT), ["images.png", "error_curves.png", "window_sweep.png"]),
        ({"images"}, ["images.png"]),
        ({"accumulated", "timesteps"}, ["error_curves.png"]),
        ({"sweep"}, ["window_sweep.png"]),
        ({"single_step", "timesteps", "ids", "chosen"}, []),
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, keys: set[str], names: list[str]) -> None:
    part = cast(GenerationReport, {key: value for key, value in REPORT.items() if key in keys})
    assert draw_generation(part, tmp_path) == [tmp_path / name for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_images_need_the_float_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="Images of identity, but none of the float model to compare with: add 'float'"
    ):
        draw_generation({"images": {"identity": IMAGES["identity"]}}, tmp_path)
    assert draw_generation({"images": {"float": IMAGES["float"]}}, tmp_path) == []


def test_fewer_images_are_a_smaller_picture(tmp_path: Path) -> None:
    widths = []
    for count in (2, 5):
        draw_generation({"images": IMAGES, "ids": torch.arange(12)}, tmp_path, images=count)
        widths.append(imread(tmp_path / "images.png").shape[1])
    assert widths[1] - widths[0] == 3 * (112 + 6)


class Diffusion(pl.LightningModule):
    """Finds its report during the test."""

    generation_report: GenerationReport | None = None

    def __init__(self, report: GenerationReport | None) -> None:
        super().__init__()
        self.found = report

    def test_step(self, batch: Tensor) -> None:
        self.generation_report = self.found


class Holder(pl.Callback):
    """A callback in somebody else's module's stead."""

    generation_report = REPORT


def run(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, logger: Any = False) -> None:
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        logger=logger,
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, DataLoader(torch.zeros(1)), verbose=False)  # type: ignore[arg-type]


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


def test_a_test_ends_with_pictures_in_the_folder(tmp_path: Path) -> None:
    run(tmp_path, Diffusion(REPORT), GenerationPictures(str(tmp_path / "a" / "b")))
    assert pictures(tmp_path / "a" / "b") == ALL


def test_without_folder_they_lie_beside_the_logs_or_in_the_root(tmp_path: Path) -> None:
    run(tmp_path / "root", Diffusion(REPORT), GenerationPictures())
    assert pictures(tmp_path / "root") == ALL
    logger = CSVLogger(tmp_path / "logs")
    run(tmp_path / "other", Diffusion(REPORT), GenerationPictures(), logger=logger)
    assert pictures(Path(logger.log_dir)) == ALL
    assert pictures(tmp_path / "other") == []


def test_another_callback_can_hold_the_report(tmp_path: Path) -> None:
    run(tmp_path, Diffusion(None), Holder(), GenerationPictures(str(tmp_path)))
    assert pictures(tmp_path) == ALL


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="GenerationPictures drew nothing: after the test, Diffusion.generation_report"
    ):
        run(tmp_path, Diffusion(None), GenerationPictures())
    assert pictures(tmp_path) == []


def test_only_the_first_rank_draws(tmp_path: Path) -> None:
    other = SimpleNamespace(is_global_zero=False, log_dir=None, default_root_dir=str(tmp_path), callbacks=[])
    GenerationPictures().on_test_end(cast(Any, other), cast(Any, SimpleNamespace(generation_report=REPORT)))
    assert pictures(tmp_path) == []


def test_no_image_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="images=0: expected at least one"):
        GenerationPictures(images=0)
