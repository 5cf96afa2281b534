"""The CIFAR ResNets against the published sizes and a direct transcription of their shortcuts."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.models import CIFARResNet


@pytest.mark.parametrize(("depth", "published_millions"), [(20, 0.27), (32, 0.46), (56, 0.85)], ids=["20", "32", "56"])
def test_has_the_published_number_of_parameters_and_layers(depth: int, published_millions: float) -> None:
    network = timm.create_model(f"cifar_resnet{depth}", num_classes=10)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert round(parameters / 1e6, 2) == published_millions
    assert len(layers) == depth


def test_head_norm_adds_exactly_one_batch_norm_before_the_classifier() -> None:
    with_norm, without = CIFARResNet(20), CIFARResNet(20, head_norm=False)
    assert with_norm.state_dict().keys() - without.state_dict().keys() == {
        f"head_norm.{key}" for key in nn.BatchNorm1d(64).state_dict()
    }
    features = with_norm.forward_head(torch.randn(64, 64, 2, 2), pre_logits=True)
    torch.testing.assert_close(features.mean(0), torch.zeros(64), atol=1e-5, rtol=0)


def test_shortcut_subsamples_and_pads_channels_with_zeros_on_both_sides() -> None:
    network = CIFARResNet(20)
    block: Any = network.layer2[0]
    nn.init.zeros_(block.bn2.weight)
    images = torch.rand(2, 16, 8, 8)
    out = block(images)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_logits_are_those_of_features_then_head() -> None:
    network = CIFARResNet(20, num_classes=7, in_chans=1).eval()
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(network(images), network.forward_head(network.forward_features(images)))


def test_input_is_left_as_it_was() -> None:
    images = torch.randn(2, 3, 8, 8)
    before = images.clone()
    CIFARResNet(20)(images).sum().backward()
    assert torch.equal(images, before)


def test_reset_classifier_changes_the_width_only() -> None:
    network = CIFARResNet(20, num_classes=10).eval()
    images = torch.randn(2, 3, 8, 8)
    features = network.forward_features(images)
    network.reset_classifier(3)
    assert network.num_classes == 3
    assert sum(parameter.numel() for parameter in network.get_classifier().parameters()) == 3 * 64 + 3
    assert torch.equal(network.forward_features(images), features)
    network.reset_classifier(0)
    assert network(images).shape == (2, 64)


def test_convolutions_start_with_the_variance_of_he() -> None:
    torch.manual_seed(0)
    block: Any = CIFARResNet(20).layer3[2]
    assert block.conv2.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"6 n \+ 2 layers, but found depth={depth}"):
        CIFARResNet(depth)


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="only global_pool='avg'"):
        CIFARResNet(20).reset_classifier(10, global_pool="max")
