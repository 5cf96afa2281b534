"""The Python of README and documentation runs as a reader meets it; what pages quote and name is there."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import lightning_quant
from helpers.diffusion import tiny_unet
from lightning_quant import (
    AccuQuant,
    AccuQuantModule,
    DigitsDataModule,
    GradientQuantization,
    IGQViT,
    ImageClassifier,
    ImageDiffusion,
    load_quantized,
    save_quantized,
)
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.quantizers.base import KINDS

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lightning_quant.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "num_heads": 3}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1}


def python_blocks(page: Path) -> list[str]:
    """The fenced Python of a page, from its top to its end."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


# -- what a reader has ------------------------------------------------------------------------------------------------


class BriefTrainer(pl.Trainer):
    """Two batches of a training, one of an evaluation; a calibration is whole, or it would be none."""

    def __init__(self, **arguments: Any) -> None:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        limits = dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches"), 1)
        super().__init__(**{**arguments, **quiet, **limits, "max_epochs": 1, "accelerator": "cpu", "devices": 1})

    def fit(self, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As the Trainer's."""
        self.limit_train_batches = 1.0 if getattr(model, "fit_is_calibration", False) else 2
        super().fit(model, *args, **kwargs)


class BriefIGQViT(IGQViT):
    """Calibrated on four images."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"calibration_images": 4, **settings})


class BriefAccuQuant(AccuQuant):
    """One update, from four trajectories of four steps."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        few = {"steps": 4, "window": 2, "updates": 1, "batch_size": 2, "trajectories": 4, "held_out": 2}
        super().__init__(*args[:2], **{**settings, **few})


class BriefAccuQuantModule(AccuQuantModule):
    """Measured on two images."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "images": 2})


class Diffusion(pl.LightningModule):
    """Somebody's module, which generates by a loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"unet": tiny_unet(**UNET)})
        self.noise_scheduler: Any = DDIMScheduler()

    def predict_step(self, batch: Any) -> Tensor:
        unet: Any = self.model["unet"]
        shape = (2, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        output: Tensor = unet(torch.randn(shape), torch.full((2,), 300)).sample
        return output


def digits_vit(depth: int) -> ImageClassifier:
    """With a depth of 3 the network of the config igq_vit/digits_float.yaml."""
    return ImageClassifier("vit_tiny_patch16_224", 10, model_kwargs={**VIT, "depth": depth})


def offline(*args: Any, **kwargs: Any) -> None:
    raise URLError("no route to host")


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of a reader who has nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", BriefTrainer)
    monkeypatch.setattr(lightning_quant, "IGQViT", BriefIGQViT)
    monkeypatch.setattr(lightning_quant, "AccuQuant", BriefAccuQuant)
    monkeypatch.setattr(lightning_quant, "AccuQuantModule", BriefAccuQuantModule)
    for library in ("torch_fidelity.feature_extractor_inceptionv3", "torchvision.models._api"):
        monkeypatch.setattr(f"{library}.load_state_dict_from_url", offline)
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    kinds = dict(KINDS)
    pl.seed_everything(0, verbose=False)
    yield vars(page)
    KINDS.clear()
    KINDS.update(kinds)


@pytest.fixture
def reader(newcomer: dict[str, Any]) -> dict[str, Any]:
    """The names of a reader with modules and data, whose folder holds what the commands of the pages leave."""
    module, data = ImageClassifier("cifar_resnet20", 10, model_kwargs={"in_chans": 1}), DigitsDataModule(64)
    trained = ImageClassifier("cifar_resnet20", 10, model_kwargs={"in_chans": 1})
    generating = ImageDiffusion(tiny_unet(**UNET).train(), pipeline="digits_ddim")
    BriefTrainer().fit(generating, DigitsDataModule(64, mean=(0.5,), std=(0.5,)))
    for path, network, callback in (
        ("last.ckpt", trained, GradientQuantization()),
        ("digits_vit/last.ckpt", digits_vit(3), None),
    ):
        trainer = BriefTrainer(callbacks=callback)
        trainer.fit(network, data)
        trainer.save_checkpoint(path)

    newcomer.update(
        your_module=module,
        your_vit_module=digits_vit(1),
        your_diffusion_module=Diffusion(),
        your_data=data,
    )
    return newcomer


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_python_of_a_page_runs_in_the_order_of_the_page(page: Path, request: pytest.FixtureRequest) -> None:
    """The tour needs nothing that was there before."""
    names = request.getfixturevalue("newcomer" if page.name == "tour.md" else "reader")
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_no_python_is_fenced_so_that_it_would_not_run() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) <= {"", "bash", "python", "yaml", "text"}, page
        assert not re.search(r"^ +```python", text, re.MULTILINE), page


# -- what extends the package -----------------------------------------------------------------------------------------


def test_the_interval_of_the_page_trains(reader: dict[str, Any]) -> None:
    exec(python_blocks(ROOT / "docs" / "extending.md")[0], reader)
    assert 0.4 < float(reader["Quantile"](0.5).start(torch.linspace(0.1, 1, 10), 4)) < 0.7
    module = reader["your_module"]
    BriefTrainer(callbacks=[GradientQuantization(interval=reader["Quantile"]())]).fit(module, reader["your_data"])
    assert is_calibrated(module)


def test_the_quantizer_of_the_page_is_saved_and_loaded(reader: dict[str, Any]) -> None:
    exec(python_blocks(ROOT / "docs" / "extending.md")[1], reader)
    layer, x = reader["layer"].eval(), torch.randn(3, 8)
    layer.weight_quantizer.initialize(layer.weight.detach())
    network = nn.Sequential(layer)
    loaded: Any = load_quantized(save_quantized(network, "saved"), model=nn.Sequential(nn.Linear(8, 8)))
    assert type(loaded[0].weight_quantizer).__name__ == "PowerOfTwo"
    assert torch.equal(loaded(x), network(x))


# -- what pages name --------------------------------------------------------------------------------------------------


def messages() -> Iterator[str]:
    """The texts of the package, with an ellipsis where a value stands."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.JoinedStr(values=values):
                    yield "".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in values)
                case ast.Constant(value=str(text)):
                    yield text


def test_the_messages_that_the_page_explains_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = page[page.index("## Errors") : page.index("## Questions")]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ") and "`" in line]
    # Lightning's own message among them.
    quoted = [each for cell in cells if "Lightning's" not in cell for each in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30
    texts = list(messages())
    for message in quoted:
        parts = [part.strip(" '()") for part in message.split("...")]
        parts = [part for part in parts if len(part) > 4 and not part.endswith("=")]
        assert any(all(part in text for part in parts) for text in texts), parts


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "CONTRIBUTING.md"])
def test_the_files_that_a_page_points_to_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/[a-z_/]*\.[a-z0-9]+|[a-z_/]+/)`", text)) - {"demo/quantization_report.html"}
    assert named
    for path in named:
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation, page
