from typing import Any, cast

import pytest
import timm
import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor

from helpers.attentions import NETWORKS, WINDOWED, Direct, Distort, Seen, VitAttention, error, network, open_all
from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn import SLOTS, register_attention, swap_attention


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_slots_see_the_four_tensors_of_each_attention_once(name: str) -> None:
    module, x = network(name)
    for attention in open_all(module):
        attention.observer = seen = Seen()
        module(x)
        found = dict(seen.tensors)
        assert sorted(slot for slot, _ in seen.tensors) == sorted(SLOTS)
        batch, heads, keys, depth = found["key_quantizer"].shape
        queries = 1 if type(attention).float_class is AttentionPoolLatent else keys
        assert heads == cast(Any, attention).num_heads
        assert batch % len(x) == 0
        assert batch == len(x) or name in WINDOWED
        assert found["query_quantizer"].shape == (batch, heads, queries, depth)
        assert found["value_quantizer"].shape == (batch, heads, keys, depth)
        assert found["softmax_quantizer"].shape == (batch, heads, queries, keys)
        torch.testing.assert_close(found["softmax_quantizer"].sum(-1), torch.ones(batch, heads, queries))


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_quantizer_of_any_slot_of_any_attention_acts(name: str, slot: str) -> None:
    module, x = network(name)
    expected = module(x)
    for attention in open_all(module):
        setattr(attention, slot, Distort())
        assert error(module(x), expected) > 1e-4
        setattr(attention, slot, None)
    assert error(module(x), expected) <= 1e-5


@pytest.mark.parametrize("name", ["timm vit_tiny", "torchvision vit", "torchvision swin"])
@torch.no_grad()
def test_the_observer_sees_a_tensor_before_its_quantizer_acts(name: str) -> None:
    module, x = network(name)
    attention = open_all(module)[0]
    attention.observer = plain = Seen()
    module(x)
    for slot in SLOTS:
        setattr(attention, slot, Distort())
    attention.observer = seen = Seen()
    module(x)
    for slot in ("query_quantizer", "key_quantizer", "value_quantizer"):
        assert torch.equal(dict(seen.tensors)[slot], dict(plain.tensors)[slot])


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_autocast(name: str) -> None:
    module, x = network(name)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        seen = Seen()
        for attention in open_all(module):
            attention.observer = seen
        found = module(x)
    assert found.dtype == expected.dtype
    assert error(found, expected) <= 0.05 * expected.abs().max().item()
    assert {tensor.dtype for slot, tensor in seen.tensors if slot == "softmax_quantizer"} == {torch.float32}
    assert torch.bfloat16 in {tensor.dtype for slot, tensor in seen.tensors if slot == "value_quantizer"}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_in_double_stays_in_double(name: str) -> None:
    module, x = network(name)
    module, x = module.double(), x.double()
    expected = module(x)
    for attention in open_all(module):
        attention.observer = seen = Seen()
    assert (module(x) - expected).abs().max() <= 1e-12
    assert {tensor.dtype for _, tensor in seen.tensors} == {torch.float64}


BOOLEAN = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4


BOOLEAN[0, 0, 2] = False  # a query that sees nothing


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": BOOLEAN},
    "boolean mask of keys": {"attn_mask": BOOLEAN[:, :1, :1]},
    "float mask": {"attn_mask": torch.randn(5, 7, generator=torch.Generator().manual_seed(2))},
    "float mask with -inf": {"attn_mask": torch.zeros(2, 3, 5, 7).masked_fill(~BOOLEAN, -torch.inf)},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_of_the_fused_attention(case: str) -> None:
    register_attention(Direct)
    generator = torch.Generator().manual_seed(0)
    heads = 1 if case == "grouped" else 3
    tensors = [
        torch.randn(2, h, n, 4, generator=generator, requires_grad=True) for h, n in ((3, 5), (heads, 7), (heads, 7))
    ]
    module = Direct()
    expected = module(*tensors, **CALLS[case])
    found = swap_attention(module)(*tensors, **CALLS[case])
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_dropout_acts_on_the_attention() -> None:
    register_attention(Direct)
    module = swap_attention(Direct())
    eye = torch.eye(64).expand(1, 1, 64, 64)
    found = module(torch.zeros_like(eye), eye, eye, dropout_p=0.5)
    assert set((found * 32).round(decimals=4).unique().tolist()) == {0.0, 1.0}
    assert 0.4 < (found == 0).float().mean() < 0.6


@pytest.mark.skipif(not hasattr(timm.layers, "AttentionRope"), reason="masks came later to timm's Attention")
@pytest.mark.parametrize("arguments", [{"is_causal": True}, {"attn_mask": BOOLEAN[0, 0, :, :5]}])
@torch.no_grad()
def test_masks_of_timm(arguments: dict[str, Any]) -> None:
    module = VitAttention(8, 2)
    x = torch.randn(2, 5, 8)
    expected = module(x, **arguments)
    torch.testing.assert_close(swap_attention(module)(x, **arguments), expected)
    assert not torch.allclose(module(x), expected)


class Twice(Direct):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(query, key, value) - super().forward(query, key, value)


class Never(Direct):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value


@pytest.mark.parametrize(("kind", "calls"), [(Twice, 2), (Never, 0)])
def test_a_class_that_does_not_call_the_fused_attention_once_is_refused(kind: type[Direct], calls: int) -> None:
    register_attention(kind)
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(UnsupportedModelError, match=rf"{kind.__name__} called .* {calls} times.*self\.attend"):
        swap_attention(kind())(x, x, x)
