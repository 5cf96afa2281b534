import copy
import warnings
from typing import Any

import pytest
import torch
from timm.models import swin_transformer
from torch import Tensor, nn

from helpers.attentions import (
    NETWORKS,
    PADDING,
    WINDOWED,
    Distort,
    Inputs,
    VitAttention,
    Zero,
    error,
    network,
    open_all,
)
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.nn import (
    WindowedAttention,
    check_attentions,
    register_attention,
    restore_attention,
    swap,
    swap_attention,
)


@torch.no_grad()
def test_a_float_state_dict_fits_an_opened_multihead_attention() -> None:
    module, x = network("torchvision vit")
    state, expected = copy.deepcopy(module.state_dict()), module(x)
    open_all(module)
    for parameter in module.parameters():
        parameter.zero_()
    module.load_state_dict(state)
    assert error(module(x), expected) <= 1e-5


LAYERS_WITHIN = [
    (name, layer)
    for name in NETWORKS
    for layer in (
        ["in_proj", "out_proj"]
        if name == "torchvision vit"
        else ["q_proj", "k_proj", "v_proj", "proj"]
        if name == "timm eva, separate"
        else ["qkv", "proj"]
    )
]


@pytest.mark.parametrize(("name", "layer"), LAYERS_WITHIN)
@torch.no_grad()
def test_layers_swapped_within_an_attention_are_what_runs(name: str, layer: str) -> None:
    module, x = network(name)
    expected = module(x)
    attention = open_all(module)[0]
    inputs = Inputs()
    swapped = swap(attention.get_submodule(layer), inputs)  # type: ignore[arg-type]
    assert error(module(x), expected) <= 2e-5
    assert inputs.calls == 1
    swapped.weight_quantizer = Zero()  # type: ignore[assignment]
    without = module(x)
    assert error(without, expected) > 1e-4
    swapped.weight_quantizer = None
    swapped.weight.zero_()
    torch.testing.assert_close(module(x), without)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("images", [1, 2, 3])
@torch.no_grad()
def test_windows_of_an_image_lie_together_and_quantizers_know_how_many_images(name: str, images: int) -> None:
    module, x = network(name)
    found: list[Inputs] = []
    for attention in open_all(module):
        for layer in ("qkv", "proj"):
            found.append(Inputs())
            swap(attention.get_submodule(layer), found[-1])  # type: ignore[arg-type]
    x = torch.randn(images, *x.shape[1:])
    module(x)
    together = [quantizer.last for quantizer in found]
    assert [quantizer.told for quantizer in found] == [images] * len(found)
    assert any(len(windows) > images for windows in together)
    for index in range(images):
        module(x[index : index + 1])
        for quantizer, windows in zip(found, together, strict=True):
            own = windows.unflatten(0, (images, -1))[index]
            torch.testing.assert_close(quantizer.last, own, atol=1e-4, rtol=1e-4)
            assert quantizer.told == 1


@torch.no_grad()
def test_a_closed_attention_leaves_no_count_behind() -> None:
    module, x = network("timm swin")
    attention = open_all(module)[0]
    quantizer = Inputs()
    swap(attention.get_submodule("qkv"), quantizer)  # type: ignore[arg-type]
    module(x)
    restore_attention(attention)
    module(x)
    assert quantizer.told is None
    assert "images" not in vars(attention)


@torch.no_grad()
def test_windows_that_are_not_of_the_parents_images_are_refused() -> None:
    module, x = network("timm swin")
    attention = open_all(module)[0]
    module(x)
    with pytest.raises(ConfigurationError, match="got 3 windows, but the last batch of its parent had 2 images"):
        attention(torch.randn(3, 49, 12))


def test_a_windowed_attention_needs_its_parent() -> None:
    module, _ = network("timm swin")
    block = next(child for child in module.modules() if isinstance(child, swin_transformer.SwinTransformerBlock))
    for parent in (None, module):
        with pytest.raises(
            ConfigurationError, match=r"WindowAttention takes windows.*parent=block.*found parent of type (None|Swin)"
        ):
            swap_attention(block.attn, parent=parent)
        assert type(block.attn) is swin_transformer.WindowAttention


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


MULTIHEAD: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights per head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": PADDING * -3.0},
    "mask": {"attn_mask": CAUSAL},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "float mask per head": {"attn_mask": torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(3))},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", MULTIHEAD)
@torch.no_grad()
def test_multihead_attention(case: str, batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias).eval()
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 5, 8) if batch_first else torch.randn(5, 2, 8)
    output, weights = module(x, x, x, **MULTIHEAD[case])
    found, found_weights = swap_attention(module)(x, x, x, **MULTIHEAD[case])
    torch.testing.assert_close(found, output)
    torch.testing.assert_close(found_weights, weights)


@torch.no_grad()
def test_multihead_attention_unbatched() -> None:
    module, x = nn.MultiheadAttention(8, 2), torch.randn(5, 8)
    arguments = {"key_padding_mask": PADDING[1], "attn_mask": CAUSAL}
    expected = module(x, x, x, **arguments)
    torch.testing.assert_close(swap_attention(module)(x, x, x, **arguments), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kdim": 4}, "kdim or vdim"), ({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero")],
)
def test_multihead_attention_that_cannot_be_opened(arguments: dict[str, Any], message: str) -> None:
    module = nn.MultiheadAttention(8, 2, **arguments)
    with pytest.raises(UnsupportedModelError, match=f"MultiheadAttention has .*{message}"):
        swap_attention(module)
    with pytest.raises(UnsupportedModelError, match=rf'0 is a Multi.* that has .*{message}.*exclude=\["0"\]'):
        check_attentions(nn.Sequential(module))
    assert type(module) is nn.MultiheadAttention


def test_cross_attention_is_refused_when_it_is_called() -> None:
    module, x = swap_attention(nn.MultiheadAttention(8, 2)), torch.randn(5, 2, 8)
    with pytest.raises(UnsupportedModelError, match="cross-attention is not quantized"):
        module(x, torch.randn(4, 2, 8), torch.randn(4, 2, 8))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_an_encoder_layer_does_not_bypass_its_opened_attention(grad: bool, padding: Tensor | None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    expected = layer(x, src_key_padding_mask=padding)
    opened = swap_attention(layer.self_attn)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x, src_key_padding_mask=padding), expected, check_stride=False)
        opened.softmax_quantizer = Distort()
        assert error(layer(x, src_key_padding_mask=padding), expected) > 1e-3


def test_nested_tensors_of_an_encoder_are_refused_with_what_to_write() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
        open_all(encoder)
        x = torch.randn(2, 5, 8)
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="enable_nested_tensor=False"):
            encoder(x, src_key_padding_mask=PADDING)
        assert encoder(x, src_key_padding_mask=PADDING).shape == x.shape


@torch.no_grad()
def test_a_class_with_windows_is_registered_by_the_windowed_form() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = VitAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            windows: Tensor = self.attention(x.flatten(0, 1))
            return windows.view_as(x)

    register_attention(VitAttention)(WindowedAttention)
    block, x = Block(), torch.randn(3, 4, 5, 8)
    expected = block(x)
    attention = swap_attention(block.attention, parent=block)
    quantizer = Inputs()
    swap(attention.get_submodule("qkv"), quantizer)  # type: ignore[arg-type]
    torch.testing.assert_close(block(x), expected)
    assert quantizer.told == 3


def test_a_parametrised_weight_of_torchvisions_swin_is_refused() -> None:
    module, x = network("torchvision swin")
    nn.utils.parametrizations.weight_norm(open_all(module)[0].get_submodule("qkv"))
    with pytest.raises(UnsupportedModelError, match=r"ran 1 of its 2 linears.*remove parametrizations"):
        module(x)
