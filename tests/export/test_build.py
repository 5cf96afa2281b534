"""Networks are made again from a class or a factory and JSON, and only where that makes the same ones."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_quant import ImageClassifier, load_quantized, save_quantized
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.export.build import construct, deduce, mismatch
from lightning_quant.nn import swap
from lightning_quant.quantizers.dynamic import TokenQuantizer


def quantized(model: nn.Module) -> nn.Module:
    layer = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    swap(layer, TokenQuantizer(4))
    return model.eval()


def vit(**kwargs: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **kwargs)


VITS: dict[str, dict[str, Any]] = {
    "as the architecture says": {},
    "classes": {"num_classes": 7},
    "image size": {"img_size": 48, "num_classes": 7},
    "channels": {"in_chans": 1},
    "no head": {"num_classes": 0},
    "pooling": {"global_pool": "avg"},
    "sizes": {"img_size": 32, "depth": 2, "embed_dim": 96, "patch_size": 8},
    "heads, which no shape tells": {"num_heads": 6},
    "stochastic depth": {"drop_path_rate": 0.2},
}


@pytest.mark.parametrize("kwargs", VITS.values(), ids=VITS.keys())
def test_arguments_of_a_timm_transformer_are_found(kwargs: dict[str, Any]) -> None:
    model = quantized(vit(depth=2, **{k: v for k, v in kwargs.items() if k != "depth"}))
    build = deduce(model)
    assert build is not None
    assert build["class_path"] == "timm.create_model"
    assert not mismatch(model, build, settings=True)


def test_the_build_is_as_short_as_it_can_be() -> None:
    model = quantized(timm.create_model("resnet18", num_classes=3))
    expected = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18", "num_classes": 3}}
    assert deduce(model) == expected


def test_arguments_of_a_timm_swin_are_found() -> None:
    model = quantized(timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 2), num_heads=(2, 4)))
    build = deduce(model)
    assert build is not None
    assert (build["init_args"]["depths"], build["init_args"]["img_size"]) == ([1, 2], [64, 64])


def test_arguments_that_a_subclass_hands_on_are_found() -> None:
    build = deduce(quantized(timm.create_model("deit_tiny_distilled_patch16_224", depth=2)))
    assert build is not None
    assert build["init_args"]["depth"] == 2


def test_a_network_that_this_package_registers_says_where(tmp_path: Path) -> None:
    import lightning_quant.models  # noqa: F401

    build = deduce(quantized(timm.create_model("cifar_resnet20", num_classes=4)))
    assert build is not None
    assert build["imports"].startswith("lightning_quant.models")


def test_arguments_of_a_torchvision_network_are_found() -> None:
    model = quantized(torchvision.models.resnet34(num_classes=3))
    expected = {"class_path": "torchvision.models.get_model", "init_args": {"name": "resnet34", "num_classes": 3}}
    assert deduce(model) == expected


def activation_exchanged(model: nn.Module) -> None:
    model.blocks[0].mlp.act = nn.ReLU()  # type: ignore[union-attr, index]


def scale_exchanged(model: nn.Module) -> None:
    model.blocks[1].attn.scale = 0.5  # type: ignore[union-attr, index]


def layer_taken_out(model: nn.Module) -> None:
    model.blocks[0].mlp.fc1.bias = None  # type: ignore[union-attr, index]


def module_put_in(model: nn.Module) -> None:
    model.extra = nn.ReLU()


@pytest.mark.parametrize("change", [activation_exchanged, scale_exchanged, layer_taken_out, module_put_in])
def test_a_network_that_was_changed_after_it_was_built_has_no_build(change: Any) -> None:
    model = quantized(vit(depth=2))
    assert deduce(model) is not None
    change(model)
    assert deduce(model) is None


class WithHyperparameters(pl.LightningModule):
    def __init__(self, width: int, pretrained: bool = False, extra: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(3, width)
        if pretrained:
            raise AssertionError("weights are fetched")


class WithoutHyperparameters(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(3, width)


def test_a_lightning_module_says_class_and_hyperparameters() -> None:
    assert deduce(quantized(ImageClassifier("resnet10t", num_classes=3))) == {
        "class_path": "lightning_quant.tasks.classification.ImageClassifier",
        "init_args": {
            "model": "resnet10t",
            "num_classes": 3,
            "model_kwargs": None,
            "label_smoothing": 0.0,
            "mixup_alpha": 0.0,
            "cutmix_alpha": 0.0,
            "channels_last": False,
        },
    }


def test_weights_that_a_lightning_module_fetched_are_not_fetched_again() -> None:
    model = quantized(WithHyperparameters(2))
    model.hparams["pretrained"] = True  # type: ignore[index, operator]
    build = deduce(model)
    assert build is not None
    assert build["init_args"] == {"width": 2, "pretrained": False, "extra": None}


@pytest.mark.parametrize("extra", [{1, 2}, torch.zeros(2), float("nan"), nn.ReLU])
def test_hyperparameters_that_are_not_json_are_no_build(extra: Any) -> None:
    assert deduce(quantized(WithHyperparameters(2, extra=extra))) is None


def test_a_lightning_module_that_keeps_no_hyperparameters_has_no_build() -> None:
    assert deduce(quantized(WithoutHyperparameters(2))) is None


def test_nothing_is_fetched_for_a_timm_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def create(name: str, **kwargs: Any) -> nn.Module:
        calls.append(kwargs)
        return nn.Linear(1, 1)

    monkeypatch.setattr(timm, "create_model", create)
    arguments = {"model_name": "resnet18", "pretrained": True, "checkpoint_path": "weights.pth"}
    construct({"class_path": "timm.create_model", "init_args": arguments})
    assert calls == [{"pretrained": False, "checkpoint_path": ""}]


def test_a_build_that_is_given_is_used(tmp_path: Path) -> None:
    model = quantized(nn.Linear(3, 2))
    build = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}}
    loaded = load_quantized(save_quantized(model, tmp_path / "linear", build=build))
    x = torch.randn(4, 3)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 4, "out_features": 2}, r"weight is \(2, 3\) in the model, \(2, 4\) in the built one"),
        ({"in_features": 3, "out_features": 2, "bias": False}, r"bias is \(2,\) in the model, missing in the built"),
        ({"in_features": 3}, "missing 1 required positional argument: 'out_features'"),
    ],
)
def test_a_build_of_another_network_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    build = {"class_path": "torch.nn.Linear", "init_args": arguments}
    with pytest.raises(ConfigurationError, match=rf"does not make the float form of this QuantizedLinear: .*{message}"):
        save_quantized(quantized(nn.Linear(3, 2)), tmp_path / "linear", build=build)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "builtins.eval", "torch.load", "timm.list_models"])
def test_what_makes_no_module_is_not_called(path: str) -> None:
    with pytest.raises(CheckpointError, match=rf"class_path='{path}': expected timm\.create_model or torchvision"):
        construct({"class_path": path, "init_args": {}})


@pytest.mark.parametrize("path", ["nowhere.Network", "torch.nn.Nothing", "Network"])
def test_a_class_that_is_not_there_says_how_to_go_on(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"load_quantized\(folder, model=\.\.\.\)|expected timm"):
        construct({"class_path": path, "init_args": {}})


@pytest.mark.parametrize("name", ["hf-hub:somebody/something", "vit_nothing"])
def test_only_networks_that_timm_knows_are_made(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"timm knows no network '{name}'"):
        construct({"class_path": "timm.create_model", "init_args": {"model_name": name}})


@pytest.mark.parametrize("build", [{}, {"class_path": "torch.nn.ReLU"}, {"class_path": 1, "init_args": {}}])
def test_a_build_without_class_or_arguments_is_refused(build: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"expected \{'class_path': 'package\.Class', 'init_args'"):
        construct(build)


def test_building_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    construct({"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}})
    assert torch.equal(torch.random.get_rng_state(), before)
