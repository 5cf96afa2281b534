from typing import cast

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from helpers.attentions import NETWORKS, network, open_all
from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn import check_attentions, register_attention, swap_attention


@pytest.mark.parametrize("name", NETWORKS)
def test_check_names_what_can_be_opened_in_order(name: str) -> None:
    module, _ = network(name)
    names = check_attentions(module)
    order = [name for name, _ in module.named_modules()]
    assert names == sorted(names, key=order.index)
    opened = open_all(module)
    assert check_attentions(module) == names
    assert [module.get_submodule(name) for name in names] == opened


class MyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).unsqueeze(1).chunk(3, -1)).squeeze(1)


class MyAttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = MyAttention(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.attention(x)))


class GateAttn(nn.Module):
    """Weighs channels, as in convolutional networks."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


@torch.no_grad()
def test_an_unknown_class_is_refused_with_the_line_to_write_and_that_line_suffices() -> None:
    module = nn.Sequential(nn.MultiheadAttention(4, 1), MyAttentionBlock())
    match = r"1\.attention is a \S*\.MyAttention, .*register_attention\(MyAttention\).*exclude=\[\"1\.attention\"\]"
    with pytest.raises(UnsupportedModelError, match=match):
        check_attentions(module)
    with pytest.raises(UnsupportedModelError, match=r"register_attention\(MyAttention\)"):
        swap_attention(module.get_submodule("1.attention"))
    assert check_attentions(module, exclude=["1.attention", "0.in_proj"]) == ["0"]
    assert check_attentions(module, exclude=["1"]) == ["0"]
    assert check_attentions(module, exclude=["*"]) == []
    register_attention(MyAttention)
    assert check_attentions(module) == ["0", "1.attention"]
    x = torch.randn(2, 3, 4)
    expected = module[1](x)
    swap_attention(module.get_submodule("1.attention"))
    torch.testing.assert_close(module[1](x), expected)


def test_a_network_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no attention: .* vision transformer"):
        check_attentions(nn.Sequential(nn.Conv2d(3, 3, 1), GateAttn()))


def test_attention_within_a_metric_is_no_part_of_the_network() -> None:
    class Metric(torchmetrics.MeanMetric):
        def __init__(self) -> None:
            super().__init__()
            self.net = MyAttention()

    module = nn.ModuleDict({"metric": Metric(), "attention": nn.MultiheadAttention(4, 1)})
    assert check_attentions(module) == ["attention"]
