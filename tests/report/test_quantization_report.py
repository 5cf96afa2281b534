"""The report of a run: written by a callback after any run of any method, as a page and as JSON."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from helpers.browser import needs_chromium, visit
from helpers.everyday_projects import PROJECTS, Everyday
from helpers.networks import SmallNet, quantization, trainer
from helpers.small_diffusion import SHAPE, SMALL, Project, batches, quiet_trainer
from helpers.vits import VitData, VitModule, quiet
from lightning_quant import AccuQuant, DigitsDataModule, IGQViT, IGQViTModule, QuantizationReport, analyze
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError
from lightning_quant.utilities.hashing import file_hash

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
projects = pytest.mark.parametrize("name", list(PROJECTS))


def content(folder: Path) -> Any:
    found = json.loads((folder / "quantization_report.json").read_text(encoding="utf-8"))
    assert found["format"] == "lightning_quant report"
    (run,) = found["runs"]
    return run


def after_test(name: str, folder: Path, **options: Any) -> tuple[Any, QuantizationReport]:
    """A project after fit and test, with a report of the test."""
    project = PROJECTS[name]
    torch.manual_seed(0)
    module, report = project.module(), QuantizationReport(str(folder / "report"), **options)
    run = project.trainer(folder, project.callback(), report, log_every_n_steps=2)
    run.fit(module, *project.data())
    run.test(module, *project.data(), verbose=False)
    return module, report


@pytest.fixture(scope="module", params=list(PROJECTS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    module, _ = after_test(request.param, folder)
    return request.param, folder / "report", module


def test_page_and_json_say_what_was_quantized(run: tuple[str, Path, Any]) -> None:
    name, folder, module = run
    found = content(folder)
    shown, analysis = {row["name"] for row in found["summary"]}, found["analysis"]
    assert shown >= {"size of the parameters", "time of the recorded calls"}
    assert len(analysis["layers"]) >= 4
    if name == "int4_training":
        # Its weights without the quantizers that they were trained with are no float network.
        assert not shown & {"error of the outputs", "same class as float"}
        assert all(layer["moves"] >= 0 and layer["only_quantized"] is None for layer in analysis["layers"])
    else:
        assert "error of the outputs" in shown
        assert 0 < analysis["error"] < 1
        assert all(layer["only_quantized"] >= 0 and layer["moves"] is None for layer in analysis["layers"])
    # Each name can be excluded as it stands there.
    first = {"int4_training": "net.0", "igq_vit": "backbone.patch_embed.proj", "accuquant": "first"}[name]
    assert analysis["layers"][0]["name"] == first
    assert analysis["quantized_bytes"] < analysis["float_bytes"]
    assert len(found["environment"]["SHA-256 of the float weights"]) == 64
    page = (folder / "quantization_report.html").read_text(encoding="utf-8")
    assert all(layer["name"] in page for layer in analysis["layers"])
    assert type(module).__name__ in page
    assert page.count("data:image/png;base64,") >= (2 if name == "accuquant" else 3)


def test_the_page_needs_nothing_else(run: tuple[str, Path, Any]) -> None:
    _, folder, _ = run
    page = (folder / "quantization_report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "@import" not in page
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert len(page) < 2_000_000


def test_figures_of_each_method_are_there(run: tuple[str, Path, Any]) -> None:
    name, folder, _ = run
    found = content(folder)["figures"]
    match name:
        case "igq_vit":
            assert found == {"groups": {}, "perturbations": {}}  # of an allocation, which there was none of
        case "accuquant":
            assert len(found["held_out_errors"]["ranges"]) == 7
            assert found["window"] == 2
            assert set(found["accumulated"]) == {"after ranges", "after windows"} == set(found["single_step"])


def test_a_training_reports_its_intervals(tmp_path: Path) -> None:
    report = QuantizationReport(str(tmp_path))
    trainer(quantization(), report, default_root_dir=tmp_path, log_every_n_steps=2).fit(SmallNet())
    gradients = content(tmp_path)["figures"]["gradients_at_the_end"]
    assert set(gradients) == {"net.0", "net.3", "net.8", "net.10"}
    assert all(0 < layer["gamma"] <= 1 for layer in gradients.values())
    assert "Intervals of the gradients" in (tmp_path / "quantization_report.html").read_text(encoding="utf-8")


def test_checkpoints_are_hashed_as_written_by_a_fit_and_as_read_by_a_test(tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1, save_top_k=1)
    options: Any = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer(quantization(), QuantizationReport(str(tmp_path / "fit")), kept, **options).fit(SmallNet())
    path = str(tmp_path / "kept" / "last.ckpt")
    found = content(tmp_path / "fit")["environment"]
    files = {key: value for key, value in found.items() if "ckpt" in key}
    assert set(files) == {f"SHA-256 of {each}" for each in (path, kept.best_model_path)}
    assert all(value.endswith(", written") for value in files.values())
    again = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1, save_top_k=1)
    run = trainer(quantization(), QuantizationReport(str(tmp_path / "test")), again, **options)
    run.test(SmallNet(), ckpt_path=path, verbose=False)
    files = {key: value for key, value in content(tmp_path / "test")["environment"].items() if "ckpt" in key}
    assert files == {f"SHA-256 of {path}": f"{file_hash(Path(path))}, read"}


def test_the_same_figures_go_to_loggers(tmp_path: Path) -> None:
    report, logger = QuantizationReport(str(tmp_path)), CSVLogger(tmp_path, name="", version="")
    run = trainer(quantization(), report, default_root_dir=tmp_path, logger=logger)
    run.fit(SmallNet())
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        (row,) = [row for row in csv.DictReader(file) if row["quantization/bytes"]]
    layers = content(tmp_path)["analysis"]["layers"]
    for layer in layers:
        name = f"quantization/{layer['name']}"
        assert float(row[f"{name}/moves"]) == pytest.approx(layer["moves"])
        assert float(row[f"{name}/weight_sqnr"]) == pytest.approx(layer["tensors"]["weight"]["sqnr"])


def test_a_run_is_the_same_with_and_without_a_report(tmp_path: Path) -> None:
    states = []
    for others in ([], [QuantizationReport(str(tmp_path))]):
        torch.manual_seed(0)
        module = SmallNet()
        trainer(quantization(quantizer_lr=1e-3), *others, default_root_dir=tmp_path, max_epochs=2).fit(module)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_every_evaluation_has_one(verb: str, tmp_path: Path) -> None:
    module, data = VitModule(), VitData()
    run = quiet(tmp_path, PROJECTS["igq_vit"].callback(), QuantizationReport(str(tmp_path), sensitivity=False))
    getattr(run, verb)(module, data)
    found = content(tmp_path)
    stage = {"validate": "validation", "test": "test", "predict": "prediction"}[verb]
    assert f"measured after the {stage}." in found["lead"]
    assert all(layer["only_quantized"] is None for layer in found["analysis"]["layers"])


def test_float_metrics_stand_beside(tmp_path: Path) -> None:
    after_test("int4_training", tmp_path, float_metrics={"test/loss": 0.5})
    (row,) = [row for row in content(tmp_path / "report")["summary"] if row["name"] == "test/loss"]
    assert row["float"] == "0.5"
    assert float(row["quantized"]) > 0


def test_a_float_module_gets_none_and_is_told_why(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No report: no quantizer in SmallNet has a range"):
        trainer(QuantizationReport(str(tmp_path)), default_root_dir=tmp_path).test(SmallNet(), verbose=False)
    assert not list(tmp_path.glob("*.html"))


def test_a_fit_before_a_calibration_has_no_report_and_no_warning(tmp_path: Path, recwarn: Any) -> None:
    report = QuantizationReport(str(tmp_path))
    run = quiet(tmp_path, PROJECTS["igq_vit"].callback(), report)
    run.fit(VitModule(), VitData())
    assert report.report is None
    assert not [str(each.message) for each in recwarn if "No report" in str(each.message)]


def test_no_images_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="images=0: expected at least one"):
        QuantizationReport(images=0)


# -- analyze -----------------------------------------------------------------------------------------------------------


class Noise(pl.LightningDataModule):
    def test_dataloader(self) -> DataLoader[Any]:
        return batches()  # type: ignore[return-value]


def data_of(name: str) -> Any:
    return {"int4_training": None, "igq_vit": VitData(), "accuquant": Noise()}[name]


@projects
def test_a_plan_is_analyzed_before_anything_was_trained(name: str, tmp_path: Path) -> None:
    project: Everyday = PROJECTS[name]
    run = project.trainer(tmp_path, project.callback())
    before = list(run.callbacks)
    found = analyze(project.module(), data_of(name), str(tmp_path), trainer=run)
    assert 0 < (found.error or 0) < 1
    assert (tmp_path / "quantization_report.html").is_file()
    assert run.callbacks == before


@projects
def test_a_checkpoint_is_analyzed(name: str, tmp_path: Path) -> None:
    project = PROJECTS[name]
    module = project.fitted_and_tested(tmp_path)
    path = project.saved(module, tmp_path)
    again = project.module()
    run = project.trainer(tmp_path, project.callback())
    found = analyze(again, data_of(name), str(tmp_path), str(path), sensitivity=False, trainer=run)
    assert torch.equal(project.outputs(again), project.outputs(module))
    titles = {"int4_training": "INT4 training", "igq_vit": "IGQ-ViT", "accuquant": "AccuQuant"}
    assert content(tmp_path)["title"] == f"{titles[name]}: {type(again).__name__}"
    assert (found.error is None) if name == "int4_training" else (0 < (found.error or 0) < 1)


def test_a_trained_network_is_compared_with_the_float_one_that_is_named(tmp_path: Path) -> None:
    project = PROJECTS["int4_training"]
    module, plain = project.fitted_and_tested(tmp_path), SmallNet()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "float.ckpt")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    run = project.trainer(tmp_path, project.callback())
    path = str(tmp_path / "float.ckpt")
    found = analyze(module, data_of("int4_training"), str(tmp_path), trainer=run, float_ckpt_path=path)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert (found.error or 0) > 0.1
    rows = {row["name"]: row for row in content(tmp_path)["summary"]}
    assert rows["error of the outputs"]["note"].endswith(f"float is {path}")
    (expected,) = trainer(default_root_dir=tmp_path).test(plain, verbose=False)
    logged = next(iter(expected))
    assert float(rows[logged]["float"]) == pytest.approx(expected[logged], rel=1e-3)


@pytest.mark.parametrize("content_of", ["nothing", "text", "a quantized network"])
def test_a_float_checkpoint_that_is_none_is_refused_before_anything_runs(content_of: str, tmp_path: Path) -> None:
    path = tmp_path / "float.ckpt"
    match content_of:
        case "text":
            path.write_text("no weights", encoding="utf-8")
        case "a quantized network":
            torch.save({"state_dict": PROJECTS["int4_training"].fitted_and_tested(tmp_path).state_dict()}, path)
    module = SmallNet()
    report = QuantizationReport(str(tmp_path), float_ckpt_path=str(path))
    with pytest.raises(CheckpointError, match="float_ckpt_path"):
        trainer(quantization(), report, default_root_dir=tmp_path).fit(module)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Try a longer window (window='sweep' finds one), or reconstruction=100 before the windows, or more"),
        ({"window": "sweep"}, "Try reconstruction=100 before the windows, or more updates."),
        ({"window": "sweep", "reconstruction": 2}, "Try more updates."),
    ],
)
def test_an_error_that_piles_up_has_a_remedy_that_was_not_tried(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    callback = AccuQuant(**{**SMALL, "steps": 20, "updates": 1, **options}, denoiser="unet", sample_shape=SHAPE)
    report = QuantizationReport(str(tmp_path), sensitivity=False)
    quiet_trainer(tmp_path, callbacks=[callback, report]).test(Project(), batches(), verbose=False)
    figures, (advice, *_) = content(tmp_path)["figures"], content(tmp_path)["advice"]
    stage = list(figures["single_step"])[-1]
    single = figures["single_step"][stage]
    times = figures["accumulated"][stage][-1] / (sum(single) / len(single))
    assert advice["cause"] == f"The final error is {times:.0f} times that of a single step: errors accumulate."
    assert times > 3
    assert advice["remedy"].startswith(said)


def recorded(folder: Path) -> tuple[list[str], Any, str]:
    """Titles of the pictures, figures and plan of a page."""
    found = content(folder)
    page = (folder / "quantization_report.html").read_text(encoding="utf-8")
    return re.findall(r"<figcaption>(.*?)</figcaption>", page), found["figures"], found["plan"]


@projects
def test_a_checkpoint_remembers_what_the_run_has_seen(name: str, tmp_path: Path) -> None:
    """Pictures, figures and plan of a page made from a checkpoint are those of the run's own page."""
    project = PROJECTS[name]
    # With groups allocated, which is to be drawn.
    method = (lambda: IGQViT(groups=2, calibration_images=4)) if name == "igq_vit" else project.callback
    torch.manual_seed(0)
    module, report = project.module(), QuantizationReport(str(tmp_path / "report"), sensitivity=False)
    run = project.trainer(tmp_path, method(), report, log_every_n_steps=2)
    run.fit(module, *project.data())
    if name != "int4_training":
        run.test(module, *project.data(), verbose=False)
    run.save_checkpoint(tmp_path / "kept.ckpt")
    end = project.trainer(tmp_path, method())
    path = str(tmp_path / "kept.ckpt")
    analyze(project.module(), data_of(name), str(tmp_path / "again"), path, sensitivity=False, trainer=end)
    (titles, figures, plan), found = recorded(tmp_path / "report"), recorded(tmp_path / "again")
    drawn = {"int4_training": "Intervals", "igq_vit": "Perturbation", "accuquant": "Error over the denoising"}[name]
    assert any(title.startswith(drawn) for title in titles)
    assert found == (titles, figures, plan)
    assert all(figures.values())
    hashes = content(tmp_path / "again")["environment"]
    assert hashes[f"SHA-256 of {path}"] == f"{file_hash(Path(path))}, read"


@pytest.mark.parametrize("name", ["igq_vit", "accuquant"])
def test_a_checkpoint_of_an_older_version_is_analyzed(name: str, tmp_path: Path) -> None:
    """Its calibration's state has neither plan, settings and costs, nor errors of single steps."""
    project = PROJECTS[name]
    options: dict[str, Any] = {**SMALL, "window": "sweep", "denoiser": "unet", "sample_shape": SHAPE}

    def method() -> pl.Callback:
        return IGQViT(groups=2, calibration_images=4) if name == "igq_vit" else AccuQuant(**options)

    callback = method()
    run = project.trainer(tmp_path, callback)
    run.test(project.module(), *project.data(), verbose=False)
    run.save_checkpoint(tmp_path / "kept.ckpt")
    checkpoint = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    record = checkpoint["callbacks"][callback.state_key]
    new = ("plan", "settings", "cost/", "single_step/", "window", "timesteps")
    checkpoint["callbacks"][callback.state_key] = {k: v for k, v in record.items() if not k.startswith(new)}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    end, path = project.trainer(tmp_path, method()), str(tmp_path / "old.ckpt")
    analyze(project.module(), data_of(name), str(tmp_path), path, sensitivity=False, trainer=end)
    titles, _, plan = recorded(tmp_path)
    drawn = {"igq_vit": "Channel ranges", "accuquant": "Final error over the window"}[name]
    assert any(title.startswith(drawn) for title in titles)
    assert plan == ""


def test_a_checkpoint_of_a_module_whose_fit_calibrates_it_remembers_too(tmp_path: Path) -> None:
    module, data = calibrated_vit(tmp_path, allocate=True, groups=2)
    module.trainer.save_checkpoint(tmp_path / "kept.ckpt")
    again = small_vit(allocate=True, groups=2)
    analyze(again, data, str(tmp_path), str(tmp_path / "kept.ckpt"), sensitivity=False, trainer=quiet(tmp_path))
    titles, figures, plan = recorded(tmp_path)
    assert any(title.startswith("Perturbation") for title in titles)
    assert set(figures["groups"]) == set(figures["perturbations"])
    assert plan == str(module.calibration.source.plan)


def test_metrics_of_the_float_network_are_measured_too(tmp_path: Path) -> None:
    module = VitModule()
    expected = quiet(tmp_path).test(module, VitData(), verbose=False)[0]["test/loss"]
    run = quiet(tmp_path, PROJECTS["igq_vit"].callback())
    analyze(module, VitData(), str(tmp_path), sensitivity=False, trainer=run)
    (row,) = [row for row in content(tmp_path)["summary"] if row["name"] == "test/loss"]
    assert row["float"] == f"{expected:.4g}" != row["quantized"]


def small_vit(**settings: Any) -> IGQViTModule:
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 1, "embed_dim": 24, "num_heads": 2}
    quantization = IGQViT(calibration_images=8, **settings)
    return IGQViTModule("vit_tiny_patch16_224", 10, model_kwargs=sizes, quantization=quantization)


def calibrated_vit(folder: Path, **settings: Any) -> tuple[Any, DigitsDataModule]:
    module, data = small_vit(**settings), DigitsDataModule(64, validation_fraction=0.0)
    quiet(folder, limit_test_batches=1).fit(module, data)
    return module, data


def test_a_module_whose_fit_calibrates_it_is_measured_in_float_too(tmp_path: Path) -> None:
    module, data = calibrated_vit(tmp_path, allocate=False, groups=2)
    run = quiet(tmp_path, limit_test_batches=1)
    analyze(module, data, str(tmp_path), sensitivity=False, trainer=run)
    (row,) = [row for row in content(tmp_path)["summary"] if row["name"] == "test/loss"]
    assert row["float"]
    assert is_calibrated(module)
    run.test(module, data, verbose=False)  # and it checks that again


def test_a_module_without_any_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="add GradientQuantization, IGQViT or AccuQuant"):
        analyze(SmallNet(), folder=str(tmp_path), trainer=trainer(default_root_dir=tmp_path))


# -- in a browser ------------------------------------------------------------------------------------------------------

LOOK = """
const heads = Array.from(document.querySelectorAll("table.layers th"));
const column = (at) => Array.from(document.querySelectorAll("table.layers tbody tr:not([hidden])"))
  .map((row) => row.cells[at].dataset.value);
const measured = heads.findIndex((head) => ["only this", "moves"].includes(head.textContent));
const found = {names: column(0), before: column(measured)};
heads[measured].querySelector("button").click();
found.down = column(measured);
heads[measured].querySelector("button").click();
found.up = column(measured);
const filter = document.querySelector(".filter");
filter.value = found.names[1];
filter.dispatchEvent(new Event("input"));
found.filtered = column(0);
found.shown = document.querySelector(".shown").textContent;
found.pictures = Array.from(document.images).map((image) => image.naturalWidth);
found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.ground = getComputedStyle(document.body).backgroundColor;
return found;
"""


@needs_chromium
@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_browser_pictures_show_and_the_table_sorts_and_filters(
    width: int, run: tuple[str, Path, Any], tmp_path: Path
) -> None:
    _, folder, _ = run
    found, console = visit(folder / "quantization_report.html", LOOK, tmp_path, width)
    assert not console
    assert found["names"] == [layer["name"] for layer in content(folder)["analysis"]["layers"]]
    values = [float(value) for value in found["before"]]
    assert [float(value) for value in found["down"]] == sorted(values, reverse=True)
    assert [float(value) for value in found["up"]] == sorted(values)
    assert found["names"][1] in found["filtered"]
    assert found["shown"] == f"{len(found['filtered'])} of {len(values)}"
    assert len(found["pictures"]) >= 2
    assert min(found["pictures"]) > 100
    # Wide tables scroll by themselves, the page does not.
    assert found["overflow"] == 0
