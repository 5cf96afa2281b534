"""The command line: what it runs, and what it says when it cannot."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import nn

from helpers.diffusion import tiny_pipeline_folder
from lightning_quant import ImageClassifier
from lightning_quant.cli import main
from lightning_quant.cli.advice import EXAMPLES, VERBS
from lightning_quant.cli.explain import explain
from lightning_quant.cli.lightning_cli import build
from lightning_quant.cli.packaged import FOLDER, find, names, resolve
from lightning_quant.igq_vit.callback import IGQViT

QUICKSTART = ["--config", "quickstart.yaml"]
ACCUQUANT = ["--config", "accuquant/quickstart.yaml"]
DIGITS_DIFFUSION = ["--config", "diffusion/digits.yaml"]
IGQ_VIT = "lightning_quant.igq_vit.callback.IGQViT"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


class Calibrating(Callback):
    """Looks like one that calibrates when an evaluation starts."""

    calibrates = True


class Calibrated(ImageClassifier):
    """A module whose fit is its calibration."""

    fit_is_calibration = True
    steps: ClassVar[list[int]] = []

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        self.steps.append(self.global_step)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder: packaged configs are found from anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-quant"])
    return tmp_path


def mistake(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """What stderr says, which must be one line without traceback, with an exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == code
    last = said.splitlines()[-1]
    assert last.startswith("lightning-quant: ")
    assert "Traceback" not in said
    return last


MISTAKES = {
    "no verb": (
        [],
        "A verb is missing (fit, validate, test, predict, calibrate, analyze, configs, demo); try: lightning-quant fit",
    ),
    "config before the verb": (
        ["--config", "x.yaml", "fit", "--trainer.max_epochs", "1"],
        "The verb comes first: lightning-quant fit --config x.yaml --trainer.max_epochs 1",
    ),
    "config without a verb": (QUICKSTART, "try: lightning-quant fit --config quickstart.yaml"),
    "unknown verb": (["fti", *QUICKSTART], "Unknown verb 'fti' (did you mean fit?)"),
    "missing config": (
        ["fit", "--config", "int4_training/resnet20_cifar"],
        "did you mean int4_training/resnet20_cifar",
    ),
    "missing config after =": (["fit", "--config=quikstart.yaml"], "(did you mean quickstart.yaml"),
    "config is a folder": (["fit", "--config", "."], "--config . is a folder"),
    "no model": (["fit"], "model is missing; write --config quickstart.yaml, or --model VALUE"),
    "unknown class": (
        ["fit", *QUICKSTART, "--model", "ImageClasifier"],
        "--model: there is no class ImageClasifier (did you mean ImageClassifier?)",
    ),
    "unknown class with a path": (
        ["fit", *QUICKSTART, "--data", "lightning_quant.DigitDataModule"],
        "--data: there is no class lightning_quant.DigitDataModule (did you mean DigitsDataModule",
    ),
    "unknown interval": (
        ["fit", *QUICKSTART, "--quantization.interval", "MinMax"],
        "--quantization.interval: there is no class MinMax (did you mean MinMaxInterval?)",
    ),
    "class of another option": (
        ["calibrate", *ACCUQUANT, "--model.quantization", "GradientQuantization"],
        "--model.quantization: expected AccuQuant, found GradientQuantization.",
    ),
    "unknown class that is no callback": (
        ["calibrate", *ACCUQUANT, "--model.metrics", "GenerationMetric"],
        "--model.metrics: there is no class GenerationMetric (did you mean GenerationMetrics",
    ),
    "class of another kind": (
        ["fit", *QUICKSTART, "--model", "torch.nn.Linear"],
        "--model: torch.nn.Linear is not a LightningModule",
    ),
    "callback without its argument": (
        ["fit", *QUICKSTART, "--trainer.callbacks", "EarlyStopping"],
        "needs monitor; write --trainer.callbacks EarlyStopping --trainer.callbacks.monitor VALUE",
    ),
    "callback without a name": (["fit", *QUICKSTART, "--trainer.callbacks"], "expected one argument"),
    "interval without its argument": (
        ["fit", *QUICKSTART, "--quantization.interval", "FixedInterval"],
        "needs ratio; write --quantization.interval FixedInterval --quantization.interval.ratio VALUE",
    ),
    "unknown option of the second class": (
        [
            "test",
            *QUICKSTART,
            "--quantization",
            "lightning_quant.igq_vit.callback.IGQViT",
            "--quantization.groupz",
            "4",
        ],
        "IGQViT has no option groupz (did you mean groups",
    ),
    "wrong value of the second class": (
        [
            "test",
            *QUICKSTART,
            "--quantization",
            "lightning_quant.igq_vit.callback.IGQViT",
            "--quantization.groups",
            "many",
        ],
        "--quantization.groups: Expected a <class 'int'>",
    ),
    "class that quantizes nothing": (
        ["fit", *QUICKSTART, "--quantization", "torch.nn.Linear"],
        "--quantization: torch.nn.Linear is not a GradientQuantization or IGQViT",
    ),
    "unknown option of a class": (
        ["fit", *QUICKSTART, "--quantization.weight_bts", "6"],
        "GradientQuantization has no option weight_bts (did you mean weight_bits?)",
    ),
    "unknown option": (
        ["fit", *QUICKSTART, "--trainr.max_epochs", "1"],
        "There is no option --trainr.max_epochs (did you mean trainer.max_epochs",
    ),
    "unknown option of calibrate": (
        ["calibrate", *QUICKSTART, "--trainr.max_epochs", "1"],
        "There is no option --trainr.max_epochs (did you mean trainer.max_epochs",
    ),
    "unknown option of a model's quantization": (
        ["calibrate", *ACCUQUANT, "--model.quantization.windw", "4"],
        "--model.quantization: AccuQuant has no option windw (did you mean window?)",
    ),
    "unknown option of a model's measures": (
        ["test", *ACCUQUANT, "--model.metrics.featurs", "inception"],
        "--model.metrics: GenerationMetrics has no option featurs (did you mean features?)",
    ),
    "wrong value of a model's quantization": (
        ["calibrate", *ACCUQUANT, "--model.quantization.window", "long"],
        "--model.quantization.window: Expected a <class 'int'>; Expected 'sweep'",
    ),
    "none of the choices": (
        ["calibrate", *ACCUQUANT, "--model.quantization.adjoint", "identiy"],
        "--model.quantization.adjoint: Expected one of 'identity', 'coefficient', 'exact', 'bptt', 'per_step'",
    ),
    "one in the place of a list": (
        ["calibrate", *ACCUQUANT, "--model.quantization.exclude", "conv_in"],
        "--model.quantization.exclude: Expected a list, as '[conv_in]'",
    ),
    "diffusion model without a pipeline": (
        ["calibrate", "--model", "AccuQuantModule"],
        "AccuQuantModule needs model; write --model AccuQuantModule --model.model VALUE",
    ),
    "unknown option of the third class": (
        ["test", *DIGITS_DIFFUSION, "--quantization", "AccuQuant", "--quantization.windw", "4"],
        "--quantization: AccuQuant has no option windw (did you mean window?)",
    ),
    "calibrate without a model": (
        ["calibrate"],
        "model is missing; write --config igq_vit/quickstart.yaml, or --model VALUE",
    ),
    "calibrate a diffusion model that is trained": (
        ["calibrate", *DIGITS_DIFFUSION, *QUIET],
        "ImageDiffusion is trained, not calibrated; write lightning-quant calibrate --model AccuQuantModule ..., or"
        " lightning-quant test --quantization AccuQuant ..., which calibrates ImageDiffusion first.",
    ),
    "calibrate what is trained": (
        ["calibrate", *QUICKSTART, *QUIET],
        "ImageClassifier is trained, not calibrated; write lightning-quant calibrate --model IGQViTModule ..., or"
        " lightning-quant test --quantization IGQViT ..., which calibrates ImageClassifier first.",
    ),
    "calibrate with a callback that does it": (
        ["calibrate", *QUICKSTART, *QUIET, "--trainer.callbacks", "Calibrating"],
        "Calibrating calibrates ImageClassifier when an evaluation starts; write lightning-quant test with the same",
    ),
    "wrong type": (
        ["fit", *QUICKSTART, "--trainer.max_epochs", "many"],
        "--trainer.max_epochs: Expected a <class 'int'>",
    ),
    "unknown packaged config": (["configs", "resnet20_cifar10"], "int4_training/resnet20_cifar10.yaml"),
}


@pytest.mark.parametrize(("args", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_with_what_to_write(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in mistake(capsys, *args)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Import path does not correspond to a subclass of One\n"
            "- Import path does not correspond to a subclass of Two\nGiven value: torch.nn.Linear",
            "torch.nn.Linear is not a One or Two.",
        ),
        ("Import path a.Two does not correspond to a subclass of One\n- bits=1: expected 2.", "bits=1: expected 2."),
    ],
    ids=["of no class", "of one class"],
)
def test_of_the_classes_of_an_option_the_one_that_was_meant_is_explained(said: str, expected: str) -> None:
    assert explain(said) == expected


@pytest.mark.parametrize("verb", ["fit", "test", "analyze"])
def test_a_checkpoint_that_is_not_there_is_named_with_what_is(
    verb: str, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "runs").mkdir()
    (elsewhere / "runs" / "last.ckpt").touch()
    said = mistake(capsys, verb, *QUICKSTART, "--ckpt_path", "runs/best.ckpt")
    runs = elsewhere / "runs"
    assert said.endswith(f"--ckpt_path {runs}/best.ckpt: there is no such file; the folder {runs} holds last.ckpt.")
    said = mistake(capsys, verb, *QUICKSTART, "--ckpt_path", "other/best.ckpt")
    assert said.endswith(f"other/best.ckpt: there is no such file; the folder {elsewhere} holds runs.")


@pytest.mark.parametrize("verb", ["validate", "test", "analyze"])
@pytest.mark.parametrize("name", ["best", "last", "hpc"])
def test_checkpoints_by_name_are_those_of_the_process_that_trained(
    verb: str, name: str, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    named = [verb, *QUICKSTART, *QUIET, "--ckpt_path", name]
    assert mistake(capsys, *named).endswith("lightning_logs holds nothing. Write --ckpt_path FILE")
    left = elsewhere / "lightning_logs" / "version_0" / "checkpoints"
    left.mkdir(parents=True)
    for file in ("epoch=0.ckpt", "epoch=1.ckpt"):
        torch.save({"callbacks": {"ModelCheckpoint": {"best_model_path": str(left / "epoch=0.ckpt")}}}, left / file)
    os.utime(left / "epoch=0.ckpt", (0, 0))
    said = mistake(capsys, *named)
    assert f"--ckpt_path {name}: " in said
    assert "holds version_0/checkpoints/epoch=1.ckpt, version_0/checkpoints/epoch=0.ckpt" in said
    assert said.endswith(f"Write --ckpt_path {left}/epoch={0 if name == 'best' else 1}.ckpt")


@pytest.mark.parametrize("logger", ["true", "false"])
def test_logs_that_cannot_be_written_are_refused_in_one_line(
    logger: str, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    (elsewhere / "file").touch()
    root = ["--trainer.default_root_dir=file", f"--trainer.logger={logger}"]
    said = mistake(capsys, "fit", *QUICKSTART, *QUIET, *root, code=1)
    assert f"lightning-quant: {elsewhere}/file is a file, so " in said


def test_the_last_checkpoint_is_found_in_the_folder_that_the_config_names(
    capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    saving = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=kept"]
    common = [*QUICKSTART, *QUIET, *short, "--trainer.limit_test_batches=1", *saving, "--ckpt_path=last"]
    said = mistake(capsys, "test", *common)
    assert f"there is none in {elsewhere}/kept; the folder {elsewhere}/kept holds nothing." in said
    # A training begins anew where there is none yet.
    main(["fit", *common, "--trainer.callbacks.save_last=true"])
    main(["test", *common])


def test_files_below_the_home_folder_are_found_there(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(elsewhere / "home"))
    (elsewhere / "home").mkdir()
    (elsewhere / "home" / "mine.yaml").write_text((FOLDER / "quickstart.yaml").read_text(encoding="utf-8"))
    (elsewhere / "home" / "last.ckpt").touch()
    assert resolve(["fit", "--config=~/mine.yaml"]) == ["fit", f"--config={elsewhere}/home/mine.yaml"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    main(["fit", "--config=~/mine.yaml", *QUIET, *short])
    next(elsewhere.rglob("lightning_logs/**/last.ckpt")).replace(elsewhere / "home" / "last.ckpt")
    main(["test", "--config=~/mine.yaml", *QUIET, "--ckpt_path=~/last.ckpt", "--trainer.limit_test_batches=1"])
    assert not list(elsewhere.rglob("~"))


def test_an_unknown_key_of_a_file_is_named(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("trainer:\n  max_epoch: 3\n", encoding="utf-8")
    said = mistake(capsys, "fit", *QUICKSTART, "--config", "mine.yaml")
    assert "trainer.max_epoch (did you mean trainer.max_epochs" in said


def test_what_a_callback_is_not_made_of_is_said_of_its_option(
    capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    given = "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: -2}}]}"
    (elsewhere / "mine.yaml").write_text(given, encoding="utf-8")
    said = mistake(capsys, "fit", *QUICKSTART, "--config", "mine.yaml", code=1)
    reason = "MisconfigurationException: Invalid value for save_top_k=-2. Must be >= -1 (--debug shows where)"
    assert said == f"lightning-quant: --trainer.callbacks: {reason}"


def test_quantization_in_the_group_and_in_the_callbacks_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = mistake(capsys, "fit", *QUICKSTART, "--trainer.callbacks", "GradientQuantization")
    assert "given twice" in said


@pytest.mark.parametrize("verb", ["calibrate", "test"])
@pytest.mark.parametrize("given", ["--quantization.weight_bits=3", "--quantization=AccuQuant"])
def test_a_second_quantization_beside_that_of_a_module_is_refused(
    verb: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline_folder("ddim", "digits_ddim")
    said = mistake(capsys, verb, *ACCUQUANT, *QUIET, given)
    assert "write --model.quantization.OPTION instead of --quantization.OPTION" in said


def test_one_option_changes_no_other_of_a_config(elsewhere: Path) -> None:
    tiny_pipeline_folder("ddim", "digits_ddim")
    given = ["window=null", "exclude=[conv_in]", "weight_bits=3"]
    command = ["--config", str(FOLDER / "accuquant" / "quickstart.yaml"), "--model.metrics.lpips_net=null"]
    model = build([*command, *(f"--model.quantization.{each}" for each in given)], run=False).model
    settings = model.quantization.settings
    assert (settings.window, settings.exclude, settings.weight_bits) == (None, ("conv_in",), 3)
    assert (settings.steps, settings.activation_bits, settings.held_out) == (20, 8, 16)
    assert model.metrics.lpips_net is None
    assert isinstance(model.metrics.features, nn.Flatten)


def test_an_error_of_the_package_is_one_message_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "int4_training/resnet20_cifar10.yaml", "--data.root", "nowhere", *QUIET])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("lightning-quant: No CIFAR-10 in '")


def test_an_error_in_a_constructor_is_one_message_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *QUICKSTART, "--quantization.weight_bits", "1"])
    assert stopped.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning-quant: ")
    assert "weight_bits=1: expected" in last


def test_analyze_writes_a_report_of_what_was_not_trained_yet(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    main(
        [
            "analyze",
            *QUICKSTART,
            *QUIET,
            "--folder",
            "plan",
            "--sensitivity",
            "false",
            "--trainer.limit_test_batches",
            "1",
        ]
    )
    assert (elsewhere / "plan" / "quantization_report.html").is_file()
    assert "Quantization moves the outputs by" in caplog.text
    assert f"Report: {elsewhere}/plan/quantization_report.html" in caplog.text


def test_analyze_of_a_float_model_says_what_to_add(capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "analyze", *QUICKSTART, *QUIET, "--quantization=null", code=1)
    assert "add GradientQuantization, IGQViT or AccuQuant" in said


@pytest.mark.parametrize("way", ["option", "environment"])
def test_debug_shows_the_traceback(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quant.cli.advice import UsageError

    if way == "environment":
        monkeypatch.setenv("LIGHTNING_QUANT_DEBUG", "1")
    with pytest.raises(UsageError):
        main(["fit", "--config", "nowhere.yaml", *(["--debug"] if way == "option" else [])])


@pytest.mark.parametrize("given", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml", "./quickstart.yaml"])
def test_a_packaged_config_is_found_from_any_folder(given: str) -> None:
    assert find(given) == FOLDER / "quickstart.yaml"


def test_a_local_file_goes_before_the_packaged_one(elsewhere: Path) -> None:
    (elsewhere / "quickstart.yaml").touch()
    assert find("quickstart.yaml") == Path("quickstart.yaml").absolute()


def test_only_the_values_of_config_are_resolved() -> None:
    path = str(FOLDER / "quickstart.yaml")
    assert resolve(["fit", "-c", "quickstart", "--config=quickstart", "--x", "quickstart"]) == [
        "fit", "-c", path, f"--config={path}", "--x", "quickstart",
    ]  # fmt: skip
    untouched = ["fit", "--config", "trainer: {max_epochs: 1}", "--config", "s3://bucket/x.yaml", "--config"]
    assert resolve(untouched) == untouched


def test_configs_lists_every_config_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == names()
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in listed)


def test_configs_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "quickstart.yaml"])
    assert capsys.readouterr().out == (FOLDER / "quickstart.yaml").read_text(encoding="utf-8")


def test_help_and_version_need_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    main(["--version"])
    assert capsys.readouterr().out.startswith("lightning-quant 0.")


def test_the_verbs_are_those_of_the_lightning_cli_and_two_before_it() -> None:
    from lightning_quant.cli.lightning_cli import QuantizationCLI

    assert {*QuantizationCLI.subcommands(), "configs", "demo"} == set(VERBS)


def test_fit_saves_a_config_and_a_checkpoint_that_test_takes(elsewhere: Path) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    bits = ["--quantization.weight_bits=6", "--quantization.gradient_bits=5"]
    main(["fit", *QUICKSTART, *QUIET, *short, *bits])
    saved = elsewhere / "lightning_logs" / "version_0" / "config.yaml"
    quantization = yaml.safe_load(saved.read_text(encoding="utf-8"))["quantization"]["init_args"]
    found = [quantization[f"{tensor}_bits"] for tensor in ("weight", "activation", "gradient")]
    assert found == [6, 4, 5]
    checkpoint = next(elsewhere.rglob("last.ckpt"))
    main(
        [
            "test",
            "--config",
            str(saved),
            *QUIET,
            "--ckpt_path",
            str(checkpoint),
            "--trainer.limit_test_batches=1",
        ]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that was trained quantized."""
    folder = tmp_path_factory.mktemp("trained")
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    main(["fit", *QUICKSTART, *QUIET, *short, f"--trainer.default_root_dir={folder}"])
    return next(folder.rglob("last.ckpt"))


ONE_BATCH = ["--trainer.limit_test_batches=1", "--trainer.limit_val_batches=1", "--trainer.limit_predict_batches=1"]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_evaluation_ends_with_what_ran_and_null_is_float(
    verb: str, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {}
    plain = ["--model=ImageClassifier", "--model.model_kwargs={in_chans: 1}", "--data=DigitsDataModule"]
    for way, options in (
        ("as trained", QUICKSTART),
        ("by the checkpoint alone", plain),
        ("null", [*QUICKSTART, "--quantization=null"]),
        ("null in two words", [*QUICKSTART, "--quantization", "null"]),
    ):
        caplog.clear()
        main([verb, *options, *QUIET, *ONE_BATCH, f"--ckpt_path={trained}"])
        said[way] = caplog.messages[-1]
    done = {"validate": "Validated", "test": "Tested", "predict": "Predicted"}[verb]
    assert said["as trained"] == said["by the checkpoint alone"] == f"{done} quantized, W4A4, 18 of 20 layers."
    assert said["null"] == said["null in two words"] == f"{done} in float."


def test_a_module_that_is_evaluated_quantized_refuses_null(capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(
        capsys, "test", "--config", "igq_vit/quickstart.yaml", "--model.checkpoint_path=null", "--quantization=null"
    )
    assert said.endswith("write --compare_float to evaluate both, or --model with the float network.")


def test_float_and_quantized_are_printed_side_by_side(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    small = {"depth": 1, "img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "num_heads": 2}
    config = ["--config", "igq_vit/digits_float.yaml", *QUIET, *ONE_BATCH, f"--model.model_kwargs={small}"]
    options = ["--quantization=IGQViT", "--quantization.groups=2", "--quantization.allocate=false"]
    main(["fit", *config, "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"])
    checkpoint = f"--ckpt_path={next(elsewhere.rglob('last.ckpt'))}"
    capsys.readouterr()
    main(["test", *config, checkpoint])
    plain = re.search(r"test/loss\D+([\d.]+)", capsys.readouterr().out)
    main(["test", *config, *options, "--compare_float", checkpoint])
    *_, head, first, second, third, summary = capsys.readouterr().out.splitlines()
    assert head.split() == ["metric", "float", "quantized", "difference"]
    assert plain is not None
    rows = {row.split()[0]: row.split()[1:] for row in (first, second, third)}
    assert rows.keys() == {"test/loss", "test/acc", "test/acc5"}
    in_float, quantized, difference = rows["test/loss"]
    assert float(in_float) == pytest.approx(float(plain[1]), rel=1e-3)
    assert float(difference) == pytest.approx(float(quantized) - float(in_float), abs=2e-3)
    assert float(difference) != 0
    assert summary == "3 metrics, in float and quantized."


def test_what_was_trained_quantized_is_compared_with_the_float_checkpoint_that_is_named(
    capsys: pytest.CaptureFixture[str], trained: Path, elsewhere: Path
) -> None:
    command = ["test", *QUICKSTART, *QUIET, *ONE_BATCH, f"--ckpt_path={trained}"]
    said = mistake(capsys, *command, "--compare_float", code=1)
    assert said.endswith("write the checkpoint of a float training, --float_ckpt_path FLOAT.ckpt.")
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--quantization=null"]
    main(["fit", *QUICKSTART, *QUIET, *ONE_BATCH, *short])
    capsys.readouterr()
    main([*command, f"--float_ckpt_path={next(elsewhere.rglob('last.ckpt'))}"])
    assert "3 metrics, in float and quantized." in capsys.readouterr().out


def test_in_float_there_is_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "test", *QUICKSTART, *QUIET, "--quantization=null", "--compare_float", code=1)
    assert "is in float, so there is nothing to compare" in said


def test_quantization_may_be_of_evaluation() -> None:
    model = ["--model=ImageClassifier", "--data=DigitsDataModule", "--trainer.accelerator=cpu"]
    given = [f"--quantization={IGQ_VIT}", "--quantization.groups=3"]
    callback = build([*model, *given], run=False).trainer.callbacks[0]  # type: ignore[attr-defined]
    assert isinstance(callback, IGQViT)
    assert callback.settings.groups == 3


def test_calibrate_is_fit_of_a_module_whose_fit_is_its_calibration(elsewhere: Path) -> None:
    Calibrated.steps.clear()
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=0", "--quantization=null"]
    command = ["calibrate", *QUICKSTART, "--model.class_path", "Calibrated", *QUIET, *short]
    main([*command, "--trainer.max_epochs=1"])
    assert Calibrated.steps == [0, 1]
    assert (elsewhere / "lightning_logs" / "version_0" / "config.yaml").is_file()
    checkpoint = next(elsewhere.rglob("last.ckpt"))
    main([*command, "--trainer.max_epochs=2", "--ckpt_path", str(checkpoint)])
    assert Calibrated.steps == [0, 1, 2, 3]


def test_a_transformer_is_calibrated_and_then_tested(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "igq_vit/quickstart.yaml", *QUIET, "--model.checkpoint_path=null"]
    small = ["depth: 1", "img_size: 8", "patch_size: 2", "in_chans: 1", "embed_dim: 16", "num_heads: 2"]
    config += ["--model.model_kwargs={" + ", ".join(small) + "}"]
    settings = [f"--model.quantization.{each}" for each in ("groups=2", "calibration_images=4")]
    main(["calibrate", *config, *settings])
    (checkpoint,) = elsewhere.rglob("last.ckpt")
    main(["test", *config, *settings, "--trainer.limit_test_batches=1", "--ckpt_path", str(checkpoint)])
    assert "test/acc" in capsys.readouterr().out


def test_a_float_transformer_is_tested_quantized_with_the_callback(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    small = {"depth": 1, "img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "num_heads": 2}
    options = {"activation_bits": 3, "groups": 2, "allocate": "false", "calibration_images": 4}
    main(
        [
            "test",
            *["--config", "igq_vit/digits_float.yaml", *QUIET, "--trainer.limit_test_batches=1"],
            f"--model.model_kwargs={small}",
            "--quantization=IGQViT",
            *(f"--quantization.{name}={value}" for name, value in options.items()),
        ]
    )
    assert "test/acc" in capsys.readouterr().out
    assert "3 bit, channels in 2 groups per image" in caplog.text


SMALL = {
    "steps": 4,
    "window": 2,
    "reconstruction": 0,
    "updates": 2,
    "check_every": 1,
    "batch_size": 2,
    "trajectories": 4,
    "held_out": 2,
}


def test_a_diffusion_pipeline_is_calibrated_measured_and_lets_generate(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_pipeline_folder("ddim", "digits_ddim")
    settings = [f"--model.quantization.{name}={value}" for name, value in SMALL.items()]
    command = [*ACCUQUANT, *QUIET, *settings, "--model.images=3", "--model.image_batch_size=2"]
    with warnings.catch_warnings(record=True) as warned:
        main(["calibrate", *command])
    assert not [each for each in warned if "eval mode" in str(each.message) or "__len__" in str(each.message)]
    checkpoint = ["--ckpt_path", "digits_ddim_4bit/last.ckpt"]
    errors = []
    for verb in ("validate", "test"):
        capsys.readouterr()
        main([verb, *command, *checkpoint])
        out = capsys.readouterr().out
        errors += re.findall(r"(?:val|test)/error_end\W+([\d.]+)", out)
    assert len(set(errors)) == 1 < len(errors)
    assert all(f"test/{measure}" in out for measure in ("FID2FP32", "PSNR", "SSIM"))
    main(["predict", *command, *checkpoint])
    left = Path("digits_ddim_4bit")
    assert {path.name for path in (left / "images").iterdir()} == {"000000.png", "000001.png", "000002.png"}
    assert {"images.png", "error_curves.png", "last.ckpt"} < {path.name for path in left.iterdir()}
    caplog.clear()
    main(["calibrate", *command])
    assert f"Calibration of the same weights, data and settings loaded from {elsewhere}/digits_ddim_4bit" in caplog.text
    # All that is left lies in this folder and in the log.
    assert {path.name for path in elsewhere.iterdir()} == {"digits_ddim", "digits_ddim_4bit", "lightning_logs"}


def test_a_calibration_is_stopped_and_goes_on(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline_folder("ddim", "digits_ddim")
    settings = [f"--model.quantization.{name}={value}" for name, value in SMALL.items()]
    command = [*ACCUQUANT, *QUIET, *settings]
    main(["calibrate", *command, "--trainer.max_steps=2", "--trainer.limit_val_batches=0"])
    checkpoint = ["--ckpt_path", "digits_ddim_4bit/last.ckpt"]
    with pytest.raises(SystemExit) as stopped:
        main(["validate", *command, *checkpoint])
    assert stopped.value.code == 1
    assert "The calibration stopped after step 2 of 3" in capsys.readouterr().err
    main(["calibrate", *command, *checkpoint, "--trainer.limit_val_batches=0"])
    state = torch.load("digits_ddim_4bit/last.ckpt", weights_only=True)
    assert state["accuquant"]["steps"].tolist() == [3, 3]


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_a_float_diffusion_model_is_evaluated_quantized_with_the_callback(
    verb: str, elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 8}
    network = [f"--model.network.{name}={value}" for name, value in tiny.items()]
    settings = [f"--quantization.{name}={value}" for name, value in SMALL.items()]
    short = [f"--trainer.limit_{verb}_batches=1", "--model.sampling_steps=2", "--data.batch_size=2"]
    main([verb, *DIGITS_DIFFUSION, *QUIET, *network, *short, "--quantization=AccuQuant", *settings])
    assert "AccuQuant" in caplog.text
    assert "Calibrated in" in caplog.text
    assert "over windows of 2 of 4 steps" in caplog.text
    assert list((elsewhere / "accuquant" / "trajectories").rglob("*.safetensors"))


@pytest.mark.parametrize("verb", list(EXAMPLES))
def test_help_of_a_verb_begins_with_an_example_and_what_it_does(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    begin = f"usage: lightning-quant {verb} --config FILE [--OPTION VALUE ...] lightning-quant {verb} {EXAMPLES[verb]}"
    assert " ".join(shown.split()).startswith(f"{begin} {VERBS[verb]}")
    assert EXAMPLES[verb].split()[1] in names()


def test_help_of_calibrate_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "Checkpoint of an interrupted calibration to resume." in " ".join(shown.split())
    for option in ("--model", "--data", "--ckpt_path", "--config"):
        assert option in shown


def test_fit_runs_without_quantization() -> None:
    main(["fit", *QUICKSTART, *QUIET, "--trainer.fast_dev_run=1", "--quantization", "null"])


# What is imported, counted in a fresh process.


def imported_by(*args: str, main: str = "lightning_quant.cli import main") -> set[str]:
    """Modules that a command line has imported when it ends."""
    code = (
        f"import sys\nfrom {main}\ntry: main(args={list(args)!r})\nexcept SystemExit: pass\nprint('\\n#', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("\n#")[2].split())


@pytest.mark.parametrize(
    "args",
    [["--help"], ["configs"], ["demo", "--help"], ["fti"], ["fit", "--config", "nowhere.yaml"]],
    ids=" ".join,
)
def test_answers_that_need_no_torch_import_none(args: list[str]) -> None:
    assert not {"torch", "lightning", "numpy", "jsonargparse"} & imported_by(*args)


def test_help_of_a_verb_imports_no_more_libraries_than_a_bare_lightning_cli() -> None:
    bare = imported_by("fit", "--help", main="lightning.pytorch.cli import LightningCLI as main")
    ours = imported_by("fit", "--help")
    libraries = {name.partition(".")[0] for name in ours} - {name.partition(".")[0] for name in bare}
    assert libraries - set(sys.stdlib_module_names) == {"lightning_quant"}


def test_a_config_of_a_diffusion_model_is_read_without_diffusers() -> None:
    # torchmetrics imports transformers where it is installed.
    code = "import sys, torchmetrics; print(*sys.modules)"
    theirs = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not {"diffusers", "transformers"} & (imported_by("calibrate", *ACCUQUANT, "--print_config") - theirs)


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lightning_quant", "configs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate()
    assert not errors
    assert process.returncode == 141
