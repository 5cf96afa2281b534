"""The attention of diffusers, opened in each kind of denoiser."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.attentions import error
from helpers.diffusion import tiny_condition_unet, tiny_dit, tiny_inputs, tiny_unet
from lightning_quant.errors import UnsupportedModelError
from lightning_quant.nn import restore_attention, swap_attention
from lightning_quant.nn.attention import swapped_attentions

# Networks and how many attentions they have: down, middle, up; one for each block; self and cross.
NETWORKS: dict[str, tuple[Any, int]] = {
    "unet": (tiny_unet, 4),
    "condition unet": (tiny_condition_unet, 8),
    "dit": (tiny_dit, 2),
}


class Seen(nn.Module):
    """Stands in a slot and keeps the shape that comes."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return x


def attentions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if type(module).__name__ == "Attention"]


def run(network: nn.Module) -> Tensor:
    x, conditioning = tiny_inputs(network)
    given = {name: rows for name, rows in conditioning.items() if not name.startswith("uncond_")}
    output: Tensor = network(x, timestep=torch.tensor([10, 500]), **given).sample
    return output


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_opened_networks_compute_the_same_and_the_softmax_sums_to_one(name: str) -> None:
    make, count = NETWORKS[name]
    network = make()
    expected = run(network)
    found = attentions(network)
    assert len(found) == count
    for module in found:
        swap_attention(module, *[Seen() for _ in range(4)])
    sums: list[Tensor] = []
    for _, attention in swapped_attentions(network):
        attention.observer = lambda slot, x: sums.append(x.sum(-1)) if slot == "softmax_quantizer" else None
    assert error(run(network), expected) <= 1e-5
    assert len(sums) == count
    for each in sums:
        torch.testing.assert_close(each, torch.ones_like(each))
    for module in found:
        heads: Any = module.heads
        assert module.query_quantizer.shape[:2] == (2, heads)  # type: ignore[union-attr, index]
        restore_attention(module)
    assert torch.equal(run(network), expected)


@torch.no_grad()
def test_cross_attention_has_keys_of_the_condition() -> None:
    network = tiny_condition_unet()
    x, conditioning = tiny_inputs(network)
    length = conditioning["encoder_hidden_states"].shape[1]
    module = network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    softmax = Seen()
    swap_attention(module, softmax_quantizer=softmax)
    run(network)
    assert softmax.shape[-2:] == (x.shape[2] * x.shape[3], length)


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor"])
def test_a_processor_without_the_fused_call_is_refused_with_what_to_write(name: str) -> None:
    from diffusers.models import attention_processor

    attention: Any = attentions(tiny_unet())[0]
    attention.set_processor(getattr(attention_processor, name)(*([2] if name.startswith("Sliced") else [])))
    with pytest.raises(UnsupportedModelError, match=rf"processor {name}, .*set_processor\(AttnProcessor2_0"):
        swap_attention(attention)
    attention.set_processor(attention_processor.AttnProcessor2_0())
    swap_attention(attention)
