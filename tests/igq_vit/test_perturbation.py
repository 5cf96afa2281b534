"""How far posteriors move when one layer is quantized, and the passes that this takes."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr
from torch import Tensor, nn

from helpers.vits import NETWORKS, calibration, evaluate, finished, images, vit
from lightning_quant import strip
from lightning_quant.errors import ConfigurationError
from lightning_quant.igq_vit.calibration import INPUT, SOFTMAX
from lightning_quant.igq_vit.perturbation import Replay, divergence, log_posteriors
from lightning_quant.quantizers.grouped import GroupQuantizer, RowGroupQuantizer


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_replayed_pass_is_a_whole_pass_and_skips_what_came_before(kind: str) -> None:
    make, size, channels = NETWORKS[kind]
    network, x = make(), images(2, size, channels)
    found = calibration(network, x)
    names = [name for name, _ in found.allocated]
    replay = Replay(network, lambda: network(x), names)
    calls: Counter[str] = Counter()
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: calls.update([name]))
    with torch.no_grad():
        whole = network(x)
    calls.clear()
    assert torch.equal(replay.run(names[0]), whole)
    from_start = sum(calls.values())
    calls.clear()
    last = found.source.plan.names("grouped")[-1]
    assert torch.equal(replay.run(last), whole)
    assert sum(calls.values()) <= from_start / 2
    assert calls[last] == 1


def test_a_perturbation_is_that_of_one_quantizer_alone() -> None:
    network, x = vit(), images(6)
    found = calibration(network, x)
    reference = evaluate(network, x).double().log_softmax(1)
    finished(found)
    for slot in (("blocks.0.mlp.fc1", INPUT), ("blocks.1.attn", SOFTMAX)):
        quantizer = found.candidates[slot][2]
        strip(network)
        calibration(network, x)
        setattr(network.get_submodule(slot[0]), slot[1], quantizer)
        changed = evaluate(network, x).double().log_softmax(1)
        expected = F.kl_div(changed, reference, log_target=True, reduction="batchmean")
        assert found.omega[slot][2] == pytest.approx(float(expected), rel=1e-6)


def test_posteriors_of_what_tasks_return() -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    pixels = log_posteriors({"out": logits})
    assert pixels.shape == (32, 3)
    assert torch.allclose(pixels.exp().sum(1), torch.ones(32, dtype=torch.float64))
    assert torch.allclose(pixels[5], logits[0, :, 1, 1].log_softmax(0))
    with pytest.raises(ConfigurationError, match=r"found \(2, 1\)\. Write allocate=False"):
        log_posteriors(torch.zeros(2, 1))


class Output(NamedTuple):
    """As segmenters of some libraries return it."""

    logits: Tensor
    features: Tensor


def test_posteriors_of_tuples_with_names() -> None:
    logits = torch.randn(3, 4)
    assert torch.equal(log_posteriors(Output(logits, torch.zeros(1))), log_posteriors(logits))
    with pytest.raises(ConfigurationError, match=r"found tuple\. Write allocate=False, or override"):
        log_posteriors((logits, logits))


def test_the_divergence_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator).log_softmax(-1)
    expected = rel_entr(first.exp().numpy(), second.exp().numpy()).sum(axis=1).mean()
    assert divergence(first, second) == pytest.approx(float(expected), rel=1e-12)
    assert divergence(first, first) == 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_replay_is_the_whole_pass_whichever_layer_is_changed(kind: str) -> None:
    make, size, channels = NETWORKS[kind]
    network, x = make(), images(2, size, channels)
    found = calibration(network, x)
    replay = Replay(network, lambda: network(x), [name for name, _ in found.allocated])
    plain = evaluate(network, x)
    for name, slot in found.allocated:
        quantizer: Any = GroupQuantizer(3, 2) if slot == INPUT else RowGroupQuantizer(3, 2)
        quantizer.set_ranges(torch.tensor([[-1.0, 2.0], [-0.1, 0.3]]) if slot == INPUT else torch.tensor([0.3, 0.6]))
        module = network.get_submodule(name)
        setattr(module, slot, quantizer)
        whole = evaluate(network, x)
        assert torch.equal(replay.run(name), whole), name
        setattr(module, slot, None)
        assert not torch.equal(whole, plain), name
    assert torch.equal(evaluate(network, x), plain)


def test_a_block_that_is_called_twice_is_run_again() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body: Any = vit()

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.body.blocks[0](self.body.blocks[0](self.body.patch_embed(x)))
            logits: Tensor = self.body.head(self.body.blocks[1](tokens).mean(1))
            return logits

    network, x = Recurrent(), images(2)
    replay = Replay(network, lambda: network(x), ["body.blocks.0.mlp.fc1", "body.blocks.1.mlp.fc1"])
    with torch.no_grad():
        network.body.blocks[1].mlp.fc1.weight.mul_(0.5)
    assert torch.equal(replay.run("body.blocks.1.mlp.fc1"), evaluate(network, x))
    with torch.no_grad():
        network.body.blocks[0].mlp.fc1.weight.mul_(0.5)
    assert torch.equal(replay.run("body.blocks.0.mlp.fc1"), evaluate(network, x))
