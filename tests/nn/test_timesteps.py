"""Quantizers learn the timestep from the call of the denoiser, however it is called."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.diffusion import tiny_inputs
from helpers.ranged import call, network_of, ranged
from lightning_quant.errors import QuantizationError
from lightning_quant.nn import strip, swap
from lightning_quant.nn.structure import rebuild
from lightning_quant.nn.timesteps import HOOK, unwatch_timesteps, watch_timesteps
from lightning_quant.quantizers import TimestepQuantizer

STARTS = (900, 400, 30)


def quantizer_of(starts: tuple[int, ...] = STARTS) -> TimestepQuantizer:
    quantizer = TimestepQuantizer(4, starts)
    high = torch.arange(1.0, len(quantizer.starts) + 1)[:, None]
    quantizer.set_range(-high, high)
    return quantizer


class Denoiser(nn.Module):
    def __init__(self, starts: tuple[int, ...] = STARTS) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        swap(self.layer, quantizer_of(starts))

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None) -> Tensor:
        output: Tensor = self.layer(sample)
        return output


class Conditioned(nn.Module):
    """The timestep is neither first nor second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = quantizer_of()

    def forward(self, sample: Tensor, context: Any, t: Any = 5) -> Tensor:
        moved: Tensor = self.inner(sample)
        return moved


def watched(module: nn.Module) -> Any:
    watch_timesteps(module)
    return module.eval()


def quantizer_in(module: nn.Module) -> TimestepQuantizer:
    return next(child for child in module.modules() if isinstance(child, TimestepQuantizer))


def hooked(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if HOOK in vars(child)]


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_pre_hooks) for child in module.modules())


X = torch.linspace(-4, 4, 6).view(2, 3)


@pytest.mark.parametrize(("timestep", "group"), [(950, 0), (400, 1), (0, 2), (torch.tensor(400), 1), (399.5, 1)])
@pytest.mark.parametrize("how", ["positional", "keyword", "all keywords"])
def test_the_argument_decides_wherever_it_stands(timestep: Any, group: int, how: str) -> None:
    denoiser = watched(Denoiser())
    match how:
        case "positional":
            found = denoiser(X, timestep)
        case "keyword":
            found = denoiser(X, timestep=timestep)
        case _:
            found = denoiser(class_labels=None, timestep=timestep, sample=X)
    assert quantizer_in(denoiser).group == group
    assert torch.equal(found, denoiser.layer(X))
    assert not torch.equal(found, denoiser(X, (0, 950, 950)[group]))


def test_an_argument_is_found_by_its_name() -> None:
    network = watched(Conditioned())
    network(X, 3, 950)
    assert network.inner.group == 0
    network(X, context=950, t=20)
    assert network.inner.group == 2


def test_a_batch_of_timesteps_is_a_loop_over_its_images() -> None:
    denoiser = watched(Denoiser())
    timesteps = torch.tensor([950, 20])
    expected = torch.cat([denoiser(X[i : i + 1], int(timesteps[i])) for i in range(2)])
    torch.testing.assert_close(denoiser(X, timesteps), expected)
    torch.testing.assert_close(denoiser(X, timesteps[:, None]), expected)


@pytest.mark.parametrize("kind", ["ddpm", "sd", "dit"])
def test_a_denoiser_of_diffusers_called_with_several_timesteps_equals_calls_with_one(kind: Any) -> None:
    network = ranged(kind, starts=(999, 600, 200))
    timesteps = torch.tensor([900, 100])
    with torch.no_grad():
        together = call(network, timesteps)
        alone = torch.stack([call(network, int(t))[i] for i, t in enumerate(timesteps)])
        other = torch.stack([call(network, int(t))[i] for i, t in enumerate(timesteps.flip(0))])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(other, alone, rtol=1e-2, atol=1e-2)


def test_an_embedding_that_goes_by_the_name_of_the_timestep_is_none() -> None:
    denoiser = watched(Denoiser())
    denoiser(X, 20)
    for embedding in (torch.full((2, 7), 950.0), torch.full((1, 7), 950.0)):
        denoiser(X, embedding)
        assert quantizer_in(denoiser).group == 2


@pytest.mark.parametrize("nothing", [None, "950"])
def test_what_is_no_timestep_is_left_to_the_quantizers_to_complain_of(nothing: Any) -> None:
    with pytest.raises(QuantizationError, match="call the denoiser itself with its timestep"):
        watched(Denoiser())(X, nothing)


def test_inner_blocks_of_a_dit_can_be_called_alone() -> None:
    network = ranged("dit", starts=(999, 600, 200))
    call(network, 950)
    block, x = network.transformer_blocks[0], torch.randn(2, 16, 16)
    inside = [module for module in block.modules() if isinstance(module, TimestepQuantizer)]
    for group, timestep in enumerate((950, 300, 10)):
        block(x, timestep=torch.tensor([timestep] * 2), class_labels=torch.tensor([1, 2]))
        assert {quantizer.group for quantizer in inside} == {group}
    assert quantizer_in(network.pos_embed).group == 0


@pytest.mark.parametrize("starts", [(), (999,)])
def test_one_group_needs_no_hooks(starts: tuple[int, ...]) -> None:
    assert hooked(watched(Denoiser(starts))) == []


def test_watching_again_changes_nothing() -> None:
    denoiser = watched(nn.ModuleDict({"unet": Denoiser(), "other": nn.Linear(2, 2)}))
    once = hooks(denoiser)
    watch_timesteps(denoiser)
    assert (hooks(denoiser), hooked(denoiser)) == (once, ["unet"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_tells_its_own_quantizers(clone: Callable[[nn.Module], nn.Module]) -> None:
    denoiser = watched(Denoiser())
    denoiser(X, 950)
    copied: Any = clone(denoiser)
    copied(X, 20)
    assert (quantizer_in(denoiser).group, quantizer_in(copied).group) == (0, 2)
    assert torch.equal(copied(X, 400), denoiser(X, 400))
    unwatch_timesteps(copied)
    assert hooks(copied) == 0
    denoiser(X, 950)
    assert quantizer_in(denoiser).group == 0


@pytest.mark.parametrize("kind", ["ddpm", "dit"])
def test_strip_takes_the_hooks_away_and_gives_the_float_network_back(kind: Any) -> None:
    network, plain = ranged(kind, starts=(999, 600)), network_of(kind)
    assert hooks(network)
    strip(network)
    assert (hooks(network), hooked(network)) == (0, [])
    assert torch.equal(call(network, 300), call(plain, 300))


@pytest.mark.parametrize("kind", ["ddpm", "sd", "dit"])
def test_a_network_that_takes_its_structure_from_a_state_dict_is_told_the_timestep(kind: Any) -> None:
    network, plain = ranged(kind, starts=(999, 600, 200)), network_of(kind)
    rebuild(plain, network.state_dict())
    plain.load_state_dict(network.state_dict())
    assert hooked(plain) == hooked(network) != []
    with torch.no_grad():
        outputs = [call(network, t) for t in (900, 300, 100)]
        assert all(torch.equal(call(plain, t), output) for t, output in zip((900, 300, 100), outputs, strict=True))


def test_a_network_of_diffusers_is_told_by_a_call_with_keywords() -> None:
    network = ranged(starts=(999, 600, 200))
    x, _ = tiny_inputs(network)
    with torch.no_grad():
        first = network(timestep=torch.tensor(900), sample=x).sample
        assert torch.equal(network(x, 900, return_dict=False)[0], first)
        assert not torch.equal(network(x, 100).sample, first)
