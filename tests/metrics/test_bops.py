"""Bit operations against loops that count, against formulas written by hand, and against the paper's figure."""

from functools import cache
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.metrics import (
    LayerShape,
    attention_bops,
    convolution_bops,
    fully_connected_bops,
    measure_shapes,
    model_bops,
)
from lightning_quant.nn import QuantizedAttention, swap, swap_attention
from lightning_quant.quantizers import FixedQuantizer

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


@cache
def on_meta(name: str, **options: Any) -> nn.Module:
    """Moved there, since the oldest timm that is supported cannot be built there."""
    network: nn.Module = timm.create_model(name, **options)
    return network.to("meta")


def images(count: int = 1, size: int = 224) -> torch.Tensor:
    return torch.empty(count, 3, size, size, device="meta")


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options})  # type: ignore[no-any-return]


sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, st.integers(2, 8), st.integers(2, 8), st.data())
@settings(max_examples=50, deadline=None)
def test_fully_connected_counts_what_loops_count(
    tokens: int, inputs: int, outputs: int, weight: int, activation: int, data: st.DataObject
) -> None:
    groups = data.draw(st.integers(0, inputs))
    count = 0
    for _ in range(tokens):
        for _ in range(inputs):
            count += outputs * weight * activation
            count += 2 * 32 if groups else 0  # compared with the least and with the largest of its channel
    for _ in range(inputs):
        for _ in range(groups):
            count += 4 * 32  # two differences, two squares
    for _ in range(groups):
        for _ in range(tokens * outputs):
            count += 32  # the sum of one group, scaled and added
    assert fully_connected_bops(tokens, inputs, outputs, weight, activation, groups) == count


@given(sizes, sizes, sizes, sizes, st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_attention_counts_what_loops_count(queries: int, keys: int, channels: int, windows: int, bits: int) -> None:
    products = [
        bits * bits for _ in range(windows) for _ in range(queries) for _ in range(keys) for _ in range(channels)
    ]
    assert attention_bops(queries, channels, bits, windows, keys) == sum(products)
    assert attention_bops(queries, channels, bits, windows) == attention_bops(queries, channels, bits, windows, queries)


def test_sixteen_groups_cost_deit_base_three_point_three_percent() -> None:
    shapes = measure_shapes(on_meta("deit_base_patch16_224"), images())
    # The percentage counts everything that is multiplied: the patch embedding (8 bit input), the four fully connected
    # layers and the two attention products of each block, and the head, which has one token and no groups.
    layerwise, grouped = (model_bops(shapes, 4, 4, groups) for groups in (0, 16))
    assert f"{100 * (grouped.total / layerwise.total - 1):.1f}" == "3.3"
    # And the blocks alone, as the patch embedding is not what is grouped.
    inside = [sum(bops for name, bops in m.layers.items() if "blocks" in name) for m in (grouped, layerwise)]
    assert f"{100 * (inside[0] / inside[1] - 1):.1f}" == "3.3"
    assert grouped.layers["head"] == layerwise.layers["head"] == 768 * 1000 * 16


def test_deit_base_by_hand() -> None:
    n, c = 197, 768
    block = n * (3 * c * c + c * c + 8 * c * c) * 16 + 2 * n * n * c * 16
    expected = 196 * (3 * 16 * 16) * c * 4 * 8 + 12 * block + c * 1000 * 16
    shapes = measure_shapes(on_meta("deit_base_patch16_224"), images())
    assert model_bops(shapes, 4, 4).total == expected
    assert [shape.name for shape in shapes][:4] == [
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn",
        "blocks.0.attn.proj",
    ]


def swin_by_hand(c: int, depths: tuple[int, ...], weight: int, bits: int, groups: int) -> int:
    """Of a Swin at 224 pixels with windows of 7 x 7, which fit 56, 28, 14 and 7 without padding."""

    def linear(tokens: int, inputs: int, outputs: int) -> int:
        overhead = 32 * (2 * tokens * inputs + 4 * inputs * groups + groups * tokens * outputs) if groups else 0
        return tokens * inputs * outputs * weight * bits + overhead

    total, side = 56 * 56 * 48 * c * weight * 8, 56
    for stage, depth in enumerate(depths):
        if stage:
            side, c = side // 2, 2 * c
            total += linear(side * side, 2 * c, c)
        tokens, windows = side * side, (side // 7) ** 2
        layers = linear(tokens, c, 3 * c) + linear(tokens, c, c) + linear(tokens, c, 4 * c) + linear(tokens, 4 * c, c)
        total += depth * (layers + 2 * windows * 49 * 49 * c * bits * bits)
    return total + c * 1000 * weight * bits


@pytest.mark.parametrize("groups", [0, 12])
def test_every_window_of_swin_is_counted(groups: int) -> None:
    shapes = measure_shapes(on_meta("swin_tiny_patch4_window7_224"), images())
    assert model_bops(shapes, 4, 6, groups).total == swin_by_hand(96, (2, 2, 6, 2), 4, 6, groups)
    first = next(shape for shape in shapes if shape.kind == "attention")
    assert (first.tokens, first.out_features, first.windows) == (49, 49, 64)


def test_torchvision_counts_as_timm() -> None:
    torchvision = pytest.importorskip("torchvision")
    swin, transformer = torchvision.models.swin_t().to("meta"), torchvision.models.vit_b_16().to("meta")
    assert model_bops(measure_shapes(swin, images()), 4, 4, 8).total == swin_by_hand(96, (2, 2, 6, 2), 4, 4, 8)
    same = measure_shapes(on_meta("deit_base_patch16_224"), images())
    assert model_bops(measure_shapes(transformer, images()), 4, 4, 8).total == model_bops(same, 4, 4, 8).total


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_is_per_image(name: str) -> None:
    network = on_meta(name)
    assert measure_shapes(network, images(3)) == measure_shapes(network, images(1))


def test_on_meta_as_with_weights() -> None:
    assert measure_shapes(vit(), torch.zeros(2, 3, 32, 32)) == measure_shapes(
        on_meta("vit_tiny_patch16_224", **SMALL), images(1, 32)
    )


def test_a_quantized_network_has_the_shapes_of_the_float_one() -> None:
    network = vit()
    before = measure_shapes(network, torch.zeros(2, 3, 32, 32))
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            swap(module, weight_quantizer=FixedQuantizer(4))
        if name.endswith("attn"):
            swap_attention(module)
    assert measure_shapes(network, torch.zeros(2, 3, 32, 32)) == before


def test_leaves_the_network_as_it_was() -> None:
    network = vit(proj_drop_rate=0.5).train()
    network.get_submodule("blocks.0").eval()
    opened = swap_attention(network.get_submodule("blocks.1.attn"))
    seen: list[str] = []
    opened.observer = observer = lambda slot, tensor: seen.append(slot)
    before = [(name, type(module), module.training) for name, module in network.named_modules()]
    hooks = [len(module._forward_hooks) for module in network.modules()]
    measure_shapes(network, torch.zeros(1, 3, 32, 32))
    assert [(name, type(module), module.training) for name, module in network.named_modules()] == before
    assert [len(module._forward_hooks) for module in network.modules()] == hooks
    assert opened.observer is observer
    assert seen == ["query_quantizer", "key_quantizer", "softmax_quantizer", "value_quantizer"]


def test_another_forward_takes_the_place_of_the_networks_own() -> None:
    network = vit()
    shapes = measure_shapes(network, torch.zeros(2, 3, 32, 32), run=network.get_submodule("patch_embed"))
    assert [(shape.name, shape.tokens) for shape in shapes] == [("patch_embed.proj", 16)]


def test_a_forward_that_fails_leaves_the_network_as_it_was() -> None:
    network = vit()
    with pytest.raises(AssertionError):
        measure_shapes(network, torch.zeros(1, 3, 8, 8))
    assert not any(isinstance(module, QuantizedAttention) for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(module.training for module in network.modules())


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.shared = nn.Linear(6, 6)
        self.table = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        twice: torch.Tensor = self.shared(self.shared(x))
        table: torch.Tensor = self.table(torch.zeros(7, 2))
        return twice + table.sum()


def test_calls_are_summed_and_grouped_convolutions_counted_by_their_patch() -> None:
    conv, shared, table = measure_shapes(CalledTwice(), torch.zeros(1, 4, 8, 8))
    assert conv == LayerShape("conv", "convolution", 16, 4 // 2 * 9, 6)
    assert shared == LayerShape("shared", "linear", 2 * 16, 6, 6)
    assert table == LayerShape("table", "linear", 7, 2, 1)


def test_float_is_thirty_two_by_thirty_two_bits() -> None:
    shapes = measure_shapes(on_meta("deit_base_patch16_224"), images())
    assert model_bops(shapes, 32, 32, first=None).total == 64 * model_bops(shapes, 4, 4, first=None).total
    assert model_bops(shapes, 4, 4).total - model_bops(shapes, 4, 4, first=None).total == convolution_bops(
        196, 768, 768, 4, 4
    )


SHAPES = [
    LayerShape("fc", "linear", 5, 4, 8),
    LayerShape("attn", "attention", 5, 4, 5),
    LayerShape("head", "linear", 1, 4, 2),
]


def test_groups_by_name_and_by_number() -> None:
    by_name, by_number = model_bops(SHAPES, 4, 4, {"fc": 2}), model_bops(SHAPES, 4, 4, 2)
    assert by_name == by_number
    assert by_name.layers["fc"] == fully_connected_bops(5, 4, 8, 4, 4, groups=2)
    assert by_name.total == sum(by_name.layers.values())
    assert model_bops(SHAPES, 4, 4, 100) == model_bops(SHAPES, 4, 4, {"fc": 4})


def test_groups_that_cannot_be_say_so() -> None:
    with pytest.raises(ConfigurationError, match=r"groups has 'attn', which is not a fully connected.*fc, head"):
        model_bops(SHAPES, 4, 4, {"attn": 2})
    with pytest.raises(ConfigurationError, match=r"groups=5: expected 0 \(layer-wise\) .. 4"):
        model_bops(SHAPES, 4, 4, {"fc": 5})
    with pytest.raises(ConfigurationError, match="groups=-1"):
        model_bops(SHAPES, 4, 4, -1)


def test_a_network_without_layers_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match="The forward of ReLU called no Linear"):
        measure_shapes(nn.ReLU(), torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "deit_tiny_patch16_224", "swin_small_patch4_window7_224"])
def test_overhead_grows_with_the_groups_by_the_same_step(name: str) -> None:
    network = on_meta(name, img_size=224) if "dinov2" in name else on_meta(name)
    shapes = measure_shapes(network, images())
    one, two, three = (model_bops(shapes, 4, 4, groups).total for groups in (1, 2, 3))
    assert three - two == two - one > 0
