"""The demo for real, but with short trainings."""

import contextlib
import io
import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from helpers.browser import needs_chromium, visit
from lightning_quant import ImageClassifier, demo, load_from_checkpoint, load_quantized, load_quantized_pipeline
from lightning_quant.cli import main as cli
from lightning_quant.demo import accuquant, igq_vit, int4_training
from lightning_quant.errors import ConfigurationError


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and what was printed; the folder held an earlier report of another method."""
    output = tmp_path_factory.mktemp("demo")
    (output / "report.json").write_text('{"other_method": 1, "int4_training": {"old": 2}}', encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("COLUMNS", "100")
        for name, value in {"EPOCHS": 2, "SEEDS": 1, "BATCH_SIZE": 359, "LOG_EVERY": 2}.items():
            patch.setattr(int4_training, name, value)
        for name, shorter in {"EPOCHS": 2, "DRAWS": 1, "BITS": ((4, 2),)}.items():
            patch.setattr(igq_vit, name, shorter)
        small = {
            "EPOCHS": 2,
            "FEATURE_EPOCHS": 1,
            "UPDATES": 4,
            "TRAJECTORIES": 8,
            "IMAGES": 40,
            "STEPS": 6,
            "WINDOW": 2,
        }
        for name, number in small.items():
            patch.setattr(accuquant, name, number)
        warnings.simplefilter("error", UserWarning)
        printed = _run(output, seed=3)
    return output, printed


def _run(output: Path, seed: int) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        demo.main(output, seed)
    return out.getvalue() + err.getvalue()


def test_the_report_holds_the_accuracy_of_each_strategy_beside_other_methods(ran: tuple[Path, str]) -> None:
    report = json.loads((ran[0] / "report.json").read_text(encoding="utf-8"))
    assert list(report["int4_training"]) == ["float", "large_gradient", "min_max", "minimum_error"]
    assert all(0 <= accuracy <= 1 for accuracy in report["int4_training"].values())
    assert list(report["igq_vit"]) == ["float", "layer_wise", "igq_fixed", "igq_allocated", "upper_bound"]
    assert all(0 <= accuracy <= 1 for accuracy in report["igq_vit"].values())
    assert report["other_method"] == 1


def test_the_report_holds_the_distances_of_the_diffusion_model(ran: tuple[Path, str]) -> None:
    report = json.loads((ran[0] / "report.json").read_text(encoding="utf-8"))["accuquant"]
    assert list(report) == ["float", "per_step", "accuquant"]
    assert report["float"] == {"end_error": 0, "FID2FP32": 0, "PSNR": 100}
    for name in ("per_step", "accuquant"):
        assert report[name].keys() == report["float"].keys()
        assert report[name]["end_error"] > 0
        assert report[name]["FID2FP32"] > 0
        assert 0 < report[name]["PSNR"] < 100


def test_one_page_shows_all_three_methods(ran: tuple[Path, str]) -> None:
    page, names = ran[0] / "quantization_report.html", ("INT4 training", "IGQ-ViT", "AccuQuant")
    assert str(page) in ran[1]
    assert page.stat().st_size < 5_000_000
    runs = json.loads((ran[0] / "quantization_report.json").read_text(encoding="utf-8"))["runs"]
    assert [run["title"].partition(":")[0] for run in runs] == list(names)
    accuracy = {row["name"]: row for row in runs[1]["summary"]}["test/acc"]
    assert float(accuracy["float"]) > 0
    assert all(len(run["analysis"]["layers"]) > 5 for run in runs)


@needs_chromium
def test_the_page_opens_in_a_browser(ran: tuple[Path, str], tmp_path: Path) -> None:
    script = "return [document.querySelectorAll('.run').length, Array.from(document.images).map((i) => i.naturalWidth)]"
    (runs, pictures), console = visit(ran[0] / "quantization_report.html", script, tmp_path)
    assert not console
    assert runs == 3
    assert min(pictures) > 100


def test_the_quantized_pipeline_can_be_opened(ran: tuple[Path, str]) -> None:
    pipeline = load_quantized_pipeline(ran[0] / "accuquant" / "quantized")
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    assert "the same images, bit for bit" in ran[1]
    for name in ("images.png", "error_curves.png"):
        assert imread(ran[0] / name).shape[1] >= 400


def test_the_quantized_transformer_can_be_loaded(ran: tuple[Path, str]) -> None:
    network = load_quantized(ran[0] / "igq_vit" / "quantized")
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert "the same outputs, bit for bit" in ran[1]
    for name in ("budget.png", "channel_ranges.png"):
        assert imread(ran[0] / name).shape[1] >= 600


def test_the_picture_shows_something(ran: tuple[Path, str]) -> None:
    picture = imread(ran[0] / "intervals.png")
    height, width, _ = picture.shape
    assert width >= 1000
    assert height >= 500
    drawn = (picture[..., :3] < 0.9).any(axis=2).mean()
    assert 0.01 < drawn < 0.5


def test_the_table_and_what_to_try_next_are_printed(ran: tuple[Path, str]) -> None:
    output, printed = ran
    table = printed[printed.index("strategy") :]
    for title in (*int4_training.TITLES.values(), *igq_vit.TITLES.values(), *accuquant.TITLES.values()):
        assert title in table
    assert "One test image is 0.28%" in table
    assert str(output / "int4_training" / "large_gradient_3" / "last.ckpt") in table


def test_the_commands_that_are_named_exist(ran: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^ +lightning-quant (.*)$", ran[1], re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = command.split()
        monkeypatch.setattr("sys.argv", ["lightning-quant", *words])
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            cli(words if words == ["configs"] else [*words, "--print_config"])
        classes = ("lightning_quant.DigitsDataModule", "lightning_quant.AccuQuantModule")
        known = ("quickstart", *(f"class_path: {name}" for name in classes))
        assert any(word in shown.getvalue() for word in known)


def test_the_plan_is_printed_once_and_every_training_has_its_bar(ran: tuple[Path, str]) -> None:
    printed = ran[1]
    assert printed.count("18 of 20 layers quantized") == 1
    for title in (*int4_training.TITLES.values(), "float"):
        assert f"{title}, seed 3" in printed
    for chatter in ("GPU available", "Tip", "LOCAL_RANK", "Testing", "Sanity", "Seed set"):
        assert chatter not in printed


def test_every_checkpoint_is_kept(ran: tuple[Path, str]) -> None:
    folders = sorted(path.parent.name for path in ran[0].glob("int4_training/*/last.ckpt"))
    assert folders == ["float_3", "large_gradient_3", "min_max_3", "minimum_error_3"]
    path = ran[0] / "int4_training" / "large_gradient_3" / "last.ckpt"
    assert load_from_checkpoint(ImageClassifier, path).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_lightning_speaks_again_afterwards(ran: tuple[Path, str]) -> None:
    assert logging.getLogger("lightning.pytorch").getEffectiveLevel() <= logging.INFO


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(
        ConfigurationError, match=r"taken is a file, .*: write a folder that can be created and written to"
    ):
        demo.main(tmp_path / "taken", 0)
