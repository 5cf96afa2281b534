"""Modules that somebody compiled are trained and calibrated to what they are without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.everyday_projects import PROJECTS
from helpers.networks import Images, SmallNet, quantization
from helpers.networks import trainer as training
from helpers.small_diffusion import SHAPE, SMALL, Project, batches, quiet_trainer
from helpers.vits import VitData, VitModule, quiet
from lightning_quant import AccuQuant, IGQViT, QuantizationReport
from lightning_quant.calibration.module import is_calibrated
from lightning_quant.nn import swap
from lightning_quant.quantizers import LearnedQuantizer


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """What others have compiled of the same classes counts to the limit of the compiler."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module: Any, name: str | None) -> Any:
    """The module, or one of its parts, compiled without a backend that takes minutes."""
    if name is None:
        return torch.compile(module, backend="eager")
    setattr(module, name, torch.compile(getattr(module, name), backend="eager"))
    return module


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.count += 1
        return graph.forward


def vit(folder: Path) -> tuple[Trainer, Any, Any]:
    return quiet(folder, IGQViT(groups=4, calibration_images=8, allocate=False)), VitModule(), VitData()


def diffusion(folder: Path) -> tuple[Trainer, Any, Any]:
    callback = AccuQuant(**SMALL, denoiser="unet", sample_shape=SHAPE)
    return quiet_trainer(folder, callbacks=[callback]), Project(), batches()


@pytest.mark.parametrize(("make", "part"), [(vit, None), (vit, "backbone"), (diffusion, None), (diffusion, "unet")])
def test_a_calibration_and_the_test_after_it(make: Any, part: str | None, tmp_path: Path) -> None:
    outputs = []
    for which in ("plain", "compiled"):
        trainer, module, data = make(tmp_path / which)
        given = module if which == "plain" else compiled(module, part)
        trainer.test(given, data, verbose=False)
        assert is_calibrated(module)
        outputs.append(torch.cat(module.seen))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def test_what_was_compiled_in_float_is_quantized_all_the_same(tmp_path: Path) -> None:
    trainer, module, data = vit(tmp_path)
    images = next(iter(data.test_dataloader()))["image"]
    module.backbone = torch.compile(module.backbone, backend="eager")
    module.eval()
    with torch.inference_mode():
        in_float = module(images).clone()
    trainer.test(module, data, verbose=False)
    with torch.inference_mode():
        assert not torch.allclose(module(images), in_float, atol=1e-3)
        torch.testing.assert_close(module(images), module.seen[0])


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("name", list(PROJECTS))
def test_a_report_has_the_same_figures(name: str, part: bool, tmp_path: Path) -> None:
    found = []
    for which in ("plain", "compiled"):
        torch.manual_seed(0)
        project, report = PROJECTS[name], QuantizationReport(str(tmp_path / which))
        module = project.module()
        attribute = {"int4_training": "net", "igq_vit": "backbone", "accuquant": "unet"}[name] if part else None
        given = module if which == "plain" else compiled(module, attribute)
        run = project.trainer(tmp_path / which, project.callback(), report)
        run.fit(given, *project.data())
        run.test(given, *project.data(), verbose=False)
        assert report.analysis is not None
        layers = {layer.name.replace("_orig_mod.", ""): layer for layer in report.analysis.layers}
        # None where a method has no such figure.
        figures = {layer: (each.only_quantized, each.only_float) for layer, each in layers.items()}
        found.append({layer: [math.nan if v is None else v for v in values] for layer, values in figures.items()})
    close: dict[str, Any] = {"rel": 1e-3, "abs": 1e-5, "nan_ok": True}
    assert found[0] == {name: pytest.approx(values, **close) for name, values in found[1].items()}


# What is compiled, and inputs for it.
PARTS: dict[str, Callable[[Any], tuple[Any, list[Tensor]]]] = {
    "int4_training": lambda module: (module.net, [torch.randn(5, 3, 8, 8)]),
    "igq_vit": lambda module: (module.backbone, [torch.randn(5, 1, 8, 8)]),
    "accuquant": lambda module: (module.unet, [torch.randn(5, *SHAPE), torch.full((5,), 300)]),
}


class Uneven(SmallNet):
    """The last batch is a smaller one."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(20), batch_size=8)

    val_dataloader = train_dataloader


def same_states(module: LightningModule, other: LightningModule) -> None:
    for one, two in zip(*(sorted(m.state_dict().items()) for m in (module, other)), strict=True):
        torch.testing.assert_close(two[1], one[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [None, "net", "in place"])
def test_int4_training(part: str | None) -> None:
    """With a validation before the ranges are known, as somebody's fit begins, and after they are."""
    modules = []
    for which in ("plain", "compiled"):
        torch.manual_seed(0)
        module = Uneven()
        given: LightningModule = module
        if which == "compiled" and part == "in place":
            module.net.compile(backend="eager")
        elif which == "compiled":
            given = compiled(module, part)
        training(quantization(), max_epochs=2, num_sanity_val_steps=1).fit(given)
        modules.append(module)
    same_states(*modules)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    modules = []
    for which in ("plain", "compiled"):
        torch.manual_seed(0)
        module = SmallNet()
        first = training(quantization(), max_steps=2)
        first.fit(module)
        first.save_checkpoint(tmp_path / which)
        torch.manual_seed(1)
        module = SmallNet()
        if which == "compiled":
            module.net.compile(backend="eager")
        training(quantization(), max_steps=4).fit(module, ckpt_path=tmp_path / which)
        modules.append(module)
    same_states(*modules)


def test_what_a_backward_sets_is_not_traced() -> None:
    """PyTorch 2.14 mixes up the None of a gradient that a backward throws away with every None compiled after it."""
    layer = swap(nn.Linear(8, 8), LearnedQuantizer(4), LearnedQuantizer(4, signed=True))
    layer(torch.randn(4, 8))

    def returns_none(x: Tensor) -> None:
        x.add_(1)

    torch.compile(layer, backend="eager")(torch.randn(4, 8)).square().sum().backward()
    torch.compile(returns_none, backend="eager")(torch.zeros(2))


@pytest.mark.parametrize("name", list(PROJECTS))
def test_what_was_quantized_is_evaluated_in_one_graph(name: str, tmp_path: Path) -> None:
    """Of any batch size; the compiler raises at the first thing that it cannot trace."""
    module = PROJECTS[name].fitted_and_tested(tmp_path).eval()
    network, inputs = PARTS[name](module)
    graphs = Graphs()
    fast = torch.compile(network, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in (5, 3, 2):
            batch = [x[:size].clone() for x in inputs]
            torch.testing.assert_close(fast(*batch), network(*batch))
    assert graphs.count == 1


def test_the_same_graph_serves_all_groups_of_timesteps(tmp_path: Path) -> None:
    module = Project()
    callback = AccuQuant(**SMALL, activation_parameters="per_group", denoiser="unet", sample_shape=SHAPE)
    quiet_trainer(tmp_path, callbacks=[callback]).test(module, batches(), verbose=False)
    noise, timesteps = torch.randn(2, *SHAPE), list(map(torch.tensor, (999, 600, 300, 1)))
    graphs, counts = Graphs(), []
    with torch.no_grad():
        expected = [module.unet(noise, timestep) for timestep in timesteps]
        fast = torch.compile(module.unet, backend=graphs, fullgraph=True)
        for timestep, output in zip(timesteps, expected, strict=True):
            torch.testing.assert_close(fast(noise, timestep), output)
            counts.append(graphs.count)
    # PyTorch 2.6 makes one for each of the three groups.
    again = 2 if torch.__version__.startswith("2.6.") else 0
    assert counts[-1] <= counts[1] + again
