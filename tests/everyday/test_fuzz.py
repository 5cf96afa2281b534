"""Random networks, configs and files: each works, or is refused in a sentence of ours."""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.artifacts import mlp, quantized
from helpers.networks import Images, quantization, trainer
from helpers.small_diffusion import SHAPE, SMALL, Project, batches, quiet_trainer
from helpers.structures import Stack, StackDenoiser, Transformer, structures, transformers
from helpers.vits import calibration, evaluate, finished, images
from lightning_quant import AccuQuant, QuantizationError, load_quantized, save_quantized, strip
from lightning_quant.cli.advice import UsageError
from lightning_quant.cli.lightning_cli import build
from lightning_quant.cli.packaged import FOLDER
from lightning_quant.errors import CheckpointError
from lightning_quant.nn.structure import quantized_layers, rebuild

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Examples = Callable[[Any], Any]


def examples(count: int) -> Examples:
    """The same ones each time."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


# -- structures --------------------------------------------------------------------------------------------------------


def comes_back(
    quantized_network: nn.Module, fresh: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor]
) -> None:
    """From its state dict and from an artefact with the same outputs; stripped, as a network without quantizers."""
    expected = run(quantized_network.eval())
    loaded = fresh()
    state = quantized_network.state_dict()
    rebuild(loaded, state)
    loaded.load_state_dict(state)
    assert torch.equal(run(loaded.eval()), expected)
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(quantized_network, Path(folder) / "saved")
        assert torch.equal(run(load_quantized(Path(folder) / "saved", model=fresh())), expected)
    weights = {name: value.clone() for name, value in quantized_network.named_parameters()}
    strip(quantized_network)
    assert not list(quantized_layers(quantized_network))
    assert fresh().state_dict().keys() == quantized_network.state_dict().keys()
    # An attention that was opened has its projections under other names.
    stripped = dict(quantized_network.named_parameters())
    assert all(torch.equal(stripped[name], weights[name]) for name in stripped.keys() & weights.keys())
    assert run(quantized_network).isfinite().all()


def learns_in_float(network: nn.Module, *inputs: Tensor) -> bool:
    """PyTorch itself refuses some: a ReLU in place of what a ReLU needs for its gradient."""
    try:
        network(*inputs).sum().backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return False
    return True


def train_a_stack(structure: list[tuple[str, int]]) -> None:
    def run(network: nn.Module) -> Tensor:
        return evaluate(network, torch.stack([Images(4)[i][0] for i in range(4)]))

    assume(learns_in_float(Stack(structure), torch.randn(2, 3, 8, 8)))
    stack = Stack(structure)
    with tempfile.TemporaryDirectory() as folder:
        callback = quantization(first_and_last="8bit", quantizer_lr=1e-3)
        trainer(callback, default_root_dir=folder, max_steps=2).fit(stack, DataLoader(Images(), batch_size=8))
    comes_back(stack, lambda: Stack(structure), run)


def group_a_transformer(transformer: Transformer) -> None:
    network = transformer.make()
    settings: dict[str, Any] = {"groups": 2, "calibration_images": 4, "allocate": False}
    if transformer.shares and transformer.depth > 1:
        event("refused for a block that is called twice")
        with pytest.raises(QuantizationError, match=r"blocks\.0\.\S+ is called more than once.*exclude="):
            finished(calibration(network, images(4), **settings))
        return
    finished(calibration(network, images(4), **settings))
    comes_back(network, transformer.make, lambda network: evaluate(network, images(3, seed=5)))


def calibrate_a_denoiser(structure: list[tuple[str, int]]) -> None:
    def fresh() -> Project:
        project = Project()
        project.unet = StackDenoiser(structure)  # type: ignore[assignment]
        return project

    def run(network: nn.Module) -> Tensor:
        noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            output: Tensor = network.unet(noise, torch.full((2,), 300))  # type: ignore[operator]
        return output

    assume(learns_in_float(StackDenoiser(structure), torch.randn(2, *SHAPE), torch.ones(2)))
    project = fresh()
    with tempfile.TemporaryDirectory() as folder:
        ours = AccuQuant(**{**SMALL, "updates": 2}, denoiser="unet", sample_shape=SHAPE)
        quiet_trainer(Path(folder), callbacks=[ours]).test(project, batches(), verbose=False)
    comes_back(project, fresh, run)


@examples(20)
@given(structures)
def test_int4_training_of_random_stacks(structure: list[tuple[str, int]]) -> None:
    train_a_stack(structure)


@examples(8)
@given(transformers)
def test_igq_vit_of_random_transformers(transformer: Transformer) -> None:
    group_a_transformer(transformer)


@examples(5)
@given(structures)
def test_accuquant_of_random_denoisers(structure: list[tuple[str, int]]) -> None:
    calibrate_a_denoiser(structure)


# -- configs -----------------------------------------------------------------------------------------------------------

CONFIGS = (
    "quickstart.yaml",
    "int4_training/resnet20_cifar10.yaml",
    "igq_vit/quickstart.yaml",
    "accuquant/quickstart.yaml",
    "diffusion/digits.yaml",
)
CLASS = {"class_path": "torch.optim.SGD", "init_args": {"lr": "no"}}
PLAIN = (None, True, -1, 0, 2, 1.5, 1e30, float("nan"), "", "2", "1e-3", "text", (), (1,), (None,))
values = st.sampled_from([*PLAIN, {}, {"a": 1}, {"class_path": "nothing.There"}, CLASS]).map(
    lambda value: list(value) if isinstance(value, tuple) else copy.deepcopy(value)
)


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*above, key))


@st.composite
def mutated(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """A packaged config with one thing changed, and where."""
    config = yaml.safe_load((FOLDER / draw(st.sampled_from(CONFIGS))).read_text(encoding="utf-8"))
    path = draw(st.sampled_from(list(paths(config))))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    match draw(st.sampled_from(["delete", "rename", "insert", "replace", "replace", "replace"])):
        case "delete":
            del parent[path[-1]]
        case "rename" if isinstance(parent, dict):
            parent[f"{path[-1]}x"] = parent.pop(path[-1])
        case "insert" if isinstance(parent, dict):
            parent["surprise"] = draw(values)
        case _:
            parent[path[-1]] = draw(values)
    return config, path


def read_a_config(config: dict[str, Any], path: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    capsys.readouterr()
    said: list[str] = []
    try:
        build(["--config", "config.yaml"], run=False)
    except SystemExit as stopped:
        event(f"refused by the parser with {stopped.code}")
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
        assert [line.startswith("lightning-quant: ") for line in said] == [True]
        assert f"--{path[0]}" in said[0] or str(path[-1]) in said[0] or "surprise" in said[0]
    except (UsageError, QuantizationError) as error:
        event("refused by a constructor")
        said = [str(error)]
    assert all("--" in line for line in said)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-quant"])


@pytest.mark.usefixtures("empty")
@examples(80)
@given(mutated())
def test_a_changed_config_is_read_or_refused_by_its_option(
    capsys: pytest.CaptureFixture[str], changed: tuple[dict[str, Any], tuple[Any, ...]]
) -> None:
    read_a_config(*changed, capsys)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    torch.manual_seed(0)
    network = quantized(mlp())
    folder = tmp_path_factory.mktemp("fuzz") / "saved"
    save_quantized(network, folder)
    return folder, evaluate(network, torch.ones(2, 9))


names = st.sampled_from(["model.safetensors", "quantization.json"])
edits = st.tuples(st.sampled_from(["flip", "cut", "insert", "remove", "append"]), st.integers(0, 10**6), st.binary())


def read_an_artefact(artefact: tuple[Path, Tensor], name: str, edit: tuple[str, int, bytes]) -> None:
    folder, expected = artefact
    how, where, what = edit
    data = (folder / name).read_bytes()
    at = where % len(data)
    what = what or b"\0"
    changed = {
        "flip": data[:at] + bytes([data[at] ^ (what[0] or 1)]) + data[at + 1 :],
        "cut": data[:at],
        "insert": data[:at] + what + data[at:],
        "remove": data[:at] + data[at + 1 + len(what) :],
        "append": data + what,
    }[how]
    assume(changed != data)
    with tempfile.TemporaryDirectory() as other:
        shutil.copytree(folder, Path(other) / "changed")
        (Path(other) / "changed" / name).write_bytes(changed)
        torch.manual_seed(1)
        loaded, said = None, ""
        try:
            loaded = load_quantized(Path(other) / "changed", model=mlp())
        except CheckpointError as error:
            said = str(error)
        event("refused" if said else "the same outputs")
        assert loaded is not None or other in said
        if loaded is not None:
            # A space more or less.
            assert name == "quantization.json"
            assert torch.equal(evaluate(loaded, torch.ones(2, 9)), expected)


@examples(100)
@given(names, edits)
def test_a_changed_artefact_is_refused_or_means_the_same(
    artefact: tuple[Path, Tensor], name: str, edit: tuple[str, int, bytes]
) -> None:
    read_an_artefact(artefact, name, edit)


# -- the same with more examples ---------------------------------------------------------------------------------------


@pytest.mark.thorough
@examples(1000)
@given(structures)
def test_int4_training_of_many_stacks(structure: list[tuple[str, int]]) -> None:
    train_a_stack(structure)


@pytest.mark.thorough
@examples(200)
@given(transformers)
def test_igq_vit_of_many_transformers(transformer: Transformer) -> None:
    group_a_transformer(transformer)


@pytest.mark.thorough
@examples(100)
@given(structures)
def test_accuquant_of_many_denoisers(structure: list[tuple[str, int]]) -> None:
    calibrate_a_denoiser(structure)


@pytest.mark.thorough
@pytest.mark.usefixtures("empty")
@examples(3000)
@given(mutated())
def test_many_changed_configs(
    capsys: pytest.CaptureFixture[str], changed: tuple[dict[str, Any], tuple[Any, ...]]
) -> None:
    read_a_config(*changed, capsys)


@pytest.mark.thorough
@examples(3000)
@given(names, edits)
def test_many_changed_artefacts(artefact: tuple[Path, Tensor], name: str, edit: tuple[str, int, bytes]) -> None:
    read_an_artefact(artefact, name, edit)
