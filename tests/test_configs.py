"""Every packaged config is parsed and instantiated."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file

from helpers.diffusion import CLASSES, WIDTH, Kind, tiny_pipeline_folder
from lightning_quant import (
    AccuQuantModule,
    GenerationPictures,
    GradientQuantization,
    IGQViT,
    IGQViTModule,
    ImageClassifier,
    LargeGradientInterval,
)
from lightning_quant.accuquant.preparation import sampler_for
from lightning_quant.cli.lightning_cli import QuantizationCLI, build
from lightning_quant.cli.packaged import FOLDER, describe, names

EMBEDDED = ("quickstart.yaml", "digits_float.yaml")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty image folder, in an empty working folder."""
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OTHERS = ("igq_vit/", "accuquant/", "diffusion/", "trainer/")
INT4 = [name for name in names() if not name.startswith(OTHERS)]
IGQ = [name for name in names() if name.startswith("igq_vit/") and name.split("/")[1] not in EMBEDDED]


def instantiate(name: str, root: Path, *options: str) -> QuantizationCLI:
    """The model, data and trainer of a packaged config; nothing runs."""
    place = [] if name.startswith("accuquant/") or name.split("/")[-1] in EMBEDDED else [f"--data.root={root}"]
    return build(
        [
            "--config",
            str(FOLDER / name),
            *place,
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            *options,
        ],
        run=False,
    )


def quantization(cli: QuantizationCLI) -> list[GradientQuantization]:
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, GradientQuantization)]


def test_the_trainer_of_several_gpus_goes_after_any_other_config(root: Path) -> None:
    more = ("--config", str(FOLDER / "trainer/several_gpus.yaml"), "--trainer.accelerator=cpu", "--trainer.devices=2")
    trainer = instantiate("quickstart.yaml", root, *more).trainer
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.world_size == 2
    assert trainer.max_epochs == yaml.safe_load((FOLDER / "quickstart.yaml").read_text())["trainer"]["max_epochs"]


@pytest.mark.parametrize("name", INT4)
def test_every_config_is_instantiated(name: str, root: Path) -> None:
    cli = instantiate(name, root)
    assert isinstance(cli.model, ImageClassifier)
    assert len(quantization(cli)) == 1
    assert isinstance(cli.config_init["quantization"].interval, LargeGradientInterval)
    assert cli.trainer.max_epochs
    if name != "quickstart.yaml":
        assert cli.datamodule.root == root


@pytest.mark.parametrize("name", INT4)
def test_every_config_says_what_it_is_and_how_to_run_it(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert describe(name)
    assert f"lightning-quant fit --config {name}" in text
    assert "--quantization.weight_bits" in text
    assert "--quantization null" in text


@pytest.mark.parametrize("classes", [10, 100])
def test_the_cifar_recipe_is_the_papers(classes: int) -> None:
    config = yaml.safe_load((FOLDER / f"int4_training/resnet20_cifar{classes}.yaml").read_text(encoding="utf-8"))
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert config["trainer"]["max_epochs"] == 160
    assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert model["lr_scheduler"]["init_args"] == {"milestones": [80, 120], "gamma": 0.1}
    assert (data["batch_size"], data["validation_images"], data["classes"]) == (128, 0, classes)
    assert model["num_classes"] == classes


def test_bits_and_interval_are_overrides(root: Path) -> None:
    options = [
        "weight_bits=8",
        "activation_bits=6",
        "gradient_bits=5",
        "interval=FixedInterval",
        "interval.ratio=0.6",
    ]
    cli = instantiate("quickstart.yaml", root, *(f"--quantization.{option}" for option in options))
    given = cli.config["quantization"]["init_args"]
    assert (given["weight_bits"], given["activation_bits"], given["gradient_bits"]) == (8, 6, 5)
    assert given["interval"]["init_args"]["ratio"] == 0.6
    (callback,) = quantization(cli)
    assert callback.bits.weight == 8


def test_null_trains_in_float(root: Path) -> None:
    assert quantization(instantiate("quickstart.yaml", root, "--quantization=null")) == []


@pytest.mark.parametrize("class_path", ["GradientQuantization", "lightning_quant.GradientQuantization"])
def test_without_a_config_the_group_takes_a_class_or_only_its_options(class_path: str) -> None:
    model = [
        "--model=ImageClassifier",
        "--data=lightning_quant.DigitsDataModule",
        "--trainer.accelerator=cpu",
    ]
    assert quantization(build(model, run=False)) == []
    assert len(quantization(build([*model, f"--quantization={class_path}"], run=False))) == 1
    (callback,) = quantization(build([*model, "--quantization.gradient_bits=6"], run=False))
    assert callback.bits.gradient == 6


def test_quantization_is_set_up_before_the_other_callbacks(root: Path) -> None:
    cli = instantiate("quickstart.yaml", root)
    assert cli.trainer.callbacks[0] is cli.config_init["quantization"]  # type: ignore[attr-defined]


PAPER = {
    "vit_tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
}


def test_every_model_of_the_papers_table_has_a_config() -> None:
    assert sorted(IGQ) == sorted(f"igq_vit/{name}.yaml" for name in PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_igq_configs_name_the_papers_checkpoints_and_timms_transforms(name: str) -> None:
    path = f"igq_vit/{name}.yaml"
    text = (FOLDER / path).read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (model["model"], model["num_classes"], model["pretrained"]) == (PAPER[name], 1000, True)
    published = timm.get_pretrained_cfg(PAPER[name])
    assert published is not None
    assert data["image_size"] == published.input_size[-1]
    assert (data["crop_pct"], data["interpolation"]) == (published.crop_pct, published.interpolation)
    assert (tuple(data["mean"]), tuple(data["std"])) == (published.mean, published.std)
    settings = model["quantization"]["init_args"]
    assert (settings["weight_bits"], settings["activation_bits"]) == (4, 4)
    assert (settings["groups"], settings["allocate"], settings["calibration_images"]) == (8, True, 32)
    assert settings["group_ranges"] == "mean"
    for command in ("calibrate", "test"):
        assert f"lightning-quant {command} --config {path}" in text


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("allocate", [True, False])
def test_bits_and_allocation_of_igq_are_overrides(bits: int, allocate: bool, root: Path) -> None:
    options = [f"weight_bits={bits}", f"activation_bits={bits}", "groups=12", f"allocate={str(allocate).lower()}"]
    given = [f"--model.quantization.{option}" for option in options]
    cli = instantiate("igq_vit/deit_tiny.yaml", root, "--model.pretrained=false", *given)
    assert isinstance(cli.model, IGQViTModule)
    settings = cli.model.quantization.settings
    assert (settings.weight_bits, settings.activation_bits) == (bits, bits)
    assert (settings.groups, settings.allocate) == (12, allocate)


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_igq_configs_are_instantiated(name: str, root: Path) -> None:
    cli = instantiate(f"igq_vit/{name}.yaml", root, "--model.pretrained=false")
    assert isinstance(cli.model, IGQViTModule)
    assert cli.datamodule.root == root
    assert not quantization(cli)


def test_the_callback_is_a_choice_of_the_option_group(root: Path) -> None:
    cli = instantiate("igq_vit/digits_float.yaml", root, "--quantization=IGQViT", "--quantization.groups=4")
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, IGQViT)]  # type: ignore[attr-defined]
    assert callback.settings.groups == 4


# Kind of pipeline; sampler, its steps and calls of the network, steps in a window; eta and guidance.
PROTOCOL: dict[str, tuple[Kind, tuple[str, int, int, int], float, float | None]] = {
    "quickstart": ("ddim", ("DDIMSampler", 20, 20, 4), 0.0, None),
    "ddim_cifar10": ("ddim", ("DDIMSampler", 100, 100, 5), 0.0, None),
    "ldm_bedroom": ("ldm", ("DDIMSampler", 200, 200, 10), 1.0, None),
    "ldm_church": ("ldm", ("DDIMSampler", 500, 500, 10), 0.0, None),
    "ldm_imagenet": ("ldm_class", ("DDIMSampler", 20, 20, 2), 0.0, 3.0),
    # PLMS takes its second timestep twice.
    "stable_diffusion_v1_4": ("sd", ("PNDMSampler", 50, 51, 5), 0.0, 7.5),
    "dit_xl_2_256": ("dit", ("DDIMSampler", 100, 100, 5), 0.0, 1.5),
}


def accuquant(name: str, folder: Path, *options: str) -> tuple[QuantizationCLI, AccuQuantModule]:
    """A config with a tiny pipeline of its kind in the place of the real one."""
    tiny = tiny_pipeline_folder(PROTOCOL[name][0], folder / "pipeline")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\n", encoding="utf-8")
    cli = instantiate(f"accuquant/{name}.yaml", folder, f"--model.model={tiny}", *options)
    assert isinstance(cli.model, AccuQuantModule)
    return cli, cli.model


def test_every_accuquant_config_is_tested() -> None:
    found = [name for name in names() if name.startswith("accuquant/")]
    assert found == sorted(f"accuquant/{name}.yaml" for name in PROTOCOL)


@pytest.mark.parametrize("name", PROTOCOL)
def test_accuquant_configs_have_the_bits_and_the_sampling_of_the_paper(name: str, root: Path) -> None:
    _, module = accuquant(name, root)
    kind, sampling, eta, guidance = PROTOCOL[name]
    assert module.model.kind == ("ddpm" if kind == "ddim" else kind)
    settings = module.quantization.settings
    assert (settings.weight_bits, settings.activation_bits) == (4, 8)
    assert (settings.first_and_last_bits, settings.softmax_bits) == (8, 8)
    assert (settings.eta, settings.guidance, settings.adjoint) == (eta, guidance, "identity")
    sampler = sampler_for(module.parts, settings)
    assert (type(sampler).__name__, settings.steps, len(sampler.timesteps), settings.window) == sampling


@pytest.mark.parametrize("name", PROTOCOL)
def test_accuquant_configs_leave_their_files_where_their_commands_look(name: str, root: Path) -> None:
    cli, module = accuquant(name, root)
    text = (FOLDER / "accuquant" / f"{name}.yaml").read_text(encoding="utf-8")
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (saved,) = [each for each in callbacks if isinstance(each, ModelCheckpoint)]
    (drawn,) = [each for each in callbacks if isinstance(each, GenerationPictures)]
    folder = Path(saved.dirpath or "").relative_to(root).as_posix()
    assert saved.save_last
    assert (drawn.folder, module.image_folder) == (root / folder, root / folder / "images")
    assert module.quantization.cache_dir == root / folder / "calibration"
    command = f"--config accuquant/{name}.yaml"
    assert f"lightning-quant calibrate {command}\n" in text
    for verb in ("test", "predict"):
        assert f"lightning-quant {verb} {command} --ckpt_path {folder}/last.ckpt\n" in text


@pytest.mark.parametrize("name", PROTOCOL)
def test_the_options_in_the_head_of_an_accuquant_config_are_options(name: str, root: Path) -> None:
    head = (FOLDER / "accuquant" / f"{name}.yaml").read_text(encoding="utf-8").partition("seed_everything")[0]
    given = dict(re.findall(r"(--(?:model|trainer)\.[\w.]+) ([\w.]+)", head))
    files = {"--model.class_embedding": root / "table.safetensors", "--model.prompts": root / "prompts.txt"}
    save_file({"table": torch.zeros(CLASSES + 1, WIDTH)}, files["--model.class_embedding"])
    given |= {option: str(path) for option, path in files.items() if option in given}
    given.pop("--model.model", None)
    _, module = accuquant(name, root, *(f"{option}={value}" for option, value in given.items()))
    settings = module.quantization.settings
    assert (settings.weight_bits, settings.activation_bits, settings.adjoint) == (3, 6, "per_step")
    # What was named differs, what was not stays as the file has it.
    kind, (_, steps, _, window), eta, guidance = PROTOCOL[name]
    assert settings.steps != steps
    assert settings.window != window
    assert (settings.eta, settings.guidance) == (eta, guidance)
    if kind == "ldm_class":
        assert not module.model.components["class_embedding"].weight.any()
