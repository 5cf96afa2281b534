from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.tasks.networks import create_network


def _state(classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state: dict[str, torch.Tensor] = torchvision.models.shufflenet_v2_x0_5(num_classes=classes).state_dict()
    return state


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What torchvision would download."""
    state = _state(1000, seed=1)
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    return state


def test_torchvisions_networks_go_by_their_names() -> None:
    with torch.device("meta"):
        networks = [create_network(f"torchvision/{name}", 7) for name in ("vit_b_16", "swin_t")]
    assert [type(network).__name__ for network in networks] == ["VisionTransformer", "SwinTransformer"]
    assert [list(network.parameters())[-1].shape for network in networks] == [(7,), (7,)]


def test_timms_tags_are_part_of_the_name() -> None:
    network = create_network("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 7)
    assert network.num_classes == 7


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torchvision/vit_b16", "torchvision knows no network 'vit_b16'. Near: .*torchvision/vit_b_16"),
        ("torchvision/fcn_resnet50", "torchvision knows no network 'fcn_resnet50'"),
        ("vit_smal_patch16_224.augreg_in1k", "timm knows no network 'vit_smal.*Near: .*vit_small_patch16_224"),
    ],
)
def test_an_unknown_name_brings_near_ones(name: str, found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        create_network(name, 10)


def test_torchvisions_weights_are_taken_whole(published: dict[str, torch.Tensor]) -> None:
    network = create_network("torchvision/shufflenet_v2_x0_5", 1000, pretrained=True)
    for key, value in network.state_dict().items():
        assert torch.equal(value, published[key]), key


def test_a_classifier_of_another_width_stays_random(published: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    network = create_network("torchvision/shufflenet_v2_x0_5", 10, pretrained=True)
    random, state = _state(10), network.state_dict()
    differing = {key for key in state if state[key].shape != published[key].shape}
    assert differing == {"fc.weight", "fc.bias"}
    for key, value in state.items():
        assert torch.equal(value, (random if key in differing else published)[key]), key


def test_weights_for_other_arguments_are_refused(
    published: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    del published["conv1.0.weight"]
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: published)
    with pytest.raises(CheckpointError, match=r"of shufflenet_v2_x0_5 do not fit these model_kwargs(.|\n)*conv1"):
        create_network("torchvision/shufflenet_v2_x0_5", 10, pretrained=True)


def test_a_network_is_returned_as_it_is_with_weights_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(nn.Linear(3, 2).state_dict(), path)
    own = nn.Linear(3, 2)
    assert create_network(own, 2, checkpoint_path=str(path)) is own
    assert torch.equal(own.weight, safetensors.torch.load_file(path)["weight"])
    with pytest.raises(CheckpointError, match="does not hold the weights of Conv2d"):
        create_network(nn.Conv2d(3, 2, 1), 2, checkpoint_path=str(path))


@pytest.mark.parametrize("arguments", [{"pretrained": True}, {"model_kwargs": {"in_chans": 1}}])
def test_a_network_that_exists_takes_no_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="model is a Linear that is already built"):
        create_network(nn.Linear(3, 2), 2, **arguments)
