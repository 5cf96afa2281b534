"""One call a step: both branches of guidance in one batch, and the output that the scheduler's step takes."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.diffusion import tiny_condition_unet, tiny_dit, tiny_inputs, tiny_unet
from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.errors import ConfigurationError, UnsupportedModelError

NETWORKS = {"unet": tiny_unet, "condition unet": tiny_condition_unet, "dit": tiny_dit}
GUIDED = ("condition unet", "dit")


def rows(conditioning: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): r for name, r in conditioning.items() if name.startswith("uncond_") == bool(prefix)
    }


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_without_guidance_it_is_the_network(name: str) -> None:
    network = NETWORKS[name]()
    x, conditioning = tiny_inputs(network, 3)
    cond = rows(conditioning, "")
    expected = network(x, timestep=torch.tensor(40).expand(3), **cond).sample[:, : x.shape[1]]
    assert torch.equal(Denoiser(network)(x, 40, cond), expected)
    assert torch.equal(Denoiser(network)(x, 40, conditioning), expected)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_timestep_may_be_a_number_a_tensor_or_one_for_each_image(name: str) -> None:
    network = NETWORKS[name]()
    x, conditioning = tiny_inputs(network, 3)
    denoiser = Denoiser(network, guidance=None if name == "unet" else 3.0)
    expected = denoiser(x, 40, conditioning)
    for t in (torch.tensor(40), torch.tensor([40]), torch.tensor([40, 40, 40])):
        assert torch.equal(denoiser(x, t, conditioning), expected)
    assert not torch.allclose(denoiser(x, torch.tensor([40, 40, 900]), conditioning)[2], expected[2])


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_guidance_is_that_of_two_calls(name: str) -> None:
    network = NETWORKS[name]()
    x, conditioning = tiny_inputs(network)
    plain = Denoiser(network)
    cond, uncond = (plain(x, 700, rows(conditioning, prefix)) for prefix in ("", "uncond_"))
    assert (cond - uncond).abs().max() > 1e-3
    found = Denoiser(network, guidance=5.0)(x, 700, conditioning)
    torch.testing.assert_close(found, uncond + 5.0 * (cond - uncond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GUIDED)
def test_gradients_flow_through_both_branches(name: str) -> None:
    network = NETWORKS[name]()
    x, conditioning = tiny_inputs(network, 1)
    x.requires_grad_()
    guided, plain = Denoiser(network, guidance=5.0), Denoiser(network)
    (found,) = torch.autograd.grad(guided(x, 700, conditioning).square().sum(), x)
    cond, uncond = (plain(x, 700, rows(conditioning, prefix)) for prefix in ("", "uncond_"))
    (expected,) = torch.autograd.grad((uncond + 5.0 * (cond - uncond)).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


class Recorder(nn.Module):
    """Keeps what it is called with; returns in one of several forms."""

    def __init__(self, form: Any = lambda output: output) -> None:
        super().__init__()
        self.form = form
        self.inputs: list[Any] = []
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, state: Tensor, moment: Tensor, class_labels: Tensor | None = None) -> Any:
        self.inputs.append((state, moment, class_labels))
        return self.form(state * self.scale)


@pytest.mark.parametrize(
    "form",
    [lambda y: y, lambda y: (y,), lambda y: [y, None], lambda y: SimpleNamespace(sample=y)],
    ids=["tensor", "tuple", "list", "object"],
)
def test_a_network_of_ones_own_may_return_in_several_forms(form: Any) -> None:
    x = torch.randn(2, 1, 3, 3)
    assert torch.equal(Denoiser(Recorder(form))(x, 7), 2 * x)


def test_both_branches_are_one_batch_and_one_call_with_the_unconditional_first() -> None:
    network = Recorder()
    denoiser = Denoiser(network, guidance=2.0)
    x = torch.randn(2, 1, 3, 3)
    denoiser(x, 7, {"class_labels": torch.tensor([3, 4]), "uncond_class_labels": torch.tensor([9, 9])})
    state, moment, labels = network.inputs[-1]
    assert torch.equal(state, torch.cat([x, x]))
    assert moment.tolist() == [7] * 4
    assert labels.tolist() == [9, 9, 3, 4]
    assert denoiser.calls == 1


def test_a_dit_gets_the_conditional_branch_first_as_its_pipeline_gives_it() -> None:
    network = tiny_dit()
    seen: list[Any] = []
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    x, conditioning = tiny_inputs(network)
    Denoiser(network, guidance=2.0)(x, 7, conditioning)
    assert seen[0]["class_labels"].tolist() == [0, 1, 1000, 1000]


def test_a_network_in_half_precision_is_called_in_its_dtype() -> None:
    network = Recorder().bfloat16()
    output = Denoiser(network)(torch.ones(1, 1, 2, 2), 7)
    assert network.inputs[-1][0].dtype == torch.bfloat16
    assert output.dtype == torch.float32


def test_a_call_of_ones_own_is_used_in_both_branches() -> None:
    def call(network: nn.Module, x: Tensor, t: int | Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return x * conditioning["w"].view(-1, 1, 1, 1) + t

    network = tiny_unet()
    network.register_to_config(addition_embed_type="text")
    denoiser = Denoiser(network, guidance=3.0, call=call)
    x = torch.ones(1, 3, 8, 8)
    assert denoiser(x, 5, {"w": torch.tensor([2.0]), "uncond_w": torch.tensor([1.0])}).unique().tolist() == [9.0]


def test_a_scale_of_one_is_no_guidance() -> None:
    assert Denoiser(Recorder(), guidance=1.0).guidance is None


# -- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.5, -3.0, float("nan"), float("inf")])
def test_guidance_below_one_is_refused(guidance: float) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a scale above 1, as 7\.5, or None"):
        Denoiser(Recorder(), guidance)


@pytest.mark.parametrize("conditioning", [{}, {"class_labels": torch.tensor([1, 2])}])
def test_guidance_needs_the_unconditional_branch(conditioning: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigurationError, match=r"no .*uncond_class_labels: give both, or guidance=None"):
        Denoiser(Recorder(), 2.0)(torch.zeros(2, 1, 3, 3), 7, conditioning)


def test_rows_belong_to_images() -> None:
    with pytest.raises(ConfigurationError, match="class_labels has 3 rows for 2 images"):
        Denoiser(Recorder())(torch.zeros(2, 1, 3, 3), 7, {"class_labels": torch.arange(3)})


def test_a_learned_variance_of_a_unet_is_refused_with_both_shapes() -> None:
    network = tiny_unet(out_channels=6)
    with pytest.raises(UnsupportedModelError, match=r"returned \(1, 6, 8, 8\) for a state \(1, 3, 8, 8\)"):
        Denoiser(network)(torch.zeros(1, 3, 8, 8), 7)


def test_another_denoiser_of_diffusers_is_refused_with_those_that_are_supported() -> None:
    network: Any = import_module("diffusers").UNet1DModel(block_out_channels=(8, 8, 16))
    with pytest.raises(UnsupportedModelError, match=r"UNet1DModel is no .* supported are UNet2DModel, UNet2DCond"):
        Denoiser(network)


def test_a_unet_that_wants_more_conditions_is_refused() -> None:
    network = tiny_condition_unet(time_cond_proj_dim=8)
    with pytest.raises(UnsupportedModelError, match="time_cond_proj_dim=8, and needs inputs beside"):
        Denoiser(network)


def test_an_output_that_is_no_tensor_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="Recorder returned a dict: expected a tensor"):
        Denoiser(Recorder(lambda output: {"y": output}))(torch.zeros(1, 1, 2, 2), 7)
