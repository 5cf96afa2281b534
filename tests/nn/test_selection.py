from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from helpers.vits import calibration, images, vit
from lightning_quant.accuquant.plan import plan_denoiser
from lightning_quant.accuquant.settings import Settings as AccuQuantSettings
from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.gradient import GradientQuantization
from lightning_quant.nn import Bits, Plan, plan_layers

FOUR = Bits(4, 4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2))
        self.head = nn.Linear(4, 2)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2


def notes(plan: Plan) -> dict[str, str]:
    return {layer.name: layer.note for layer in plan.layers if layer.bits is None}


def test_one_row_for_each_layer_in_order_of_registration() -> None:
    plan = plan_layers(Net(), FOUR)
    assert [(row.name, row.kind, row.shape, row.bits, row.note) for row in plan.layers] == [
        ("stem", "Conv2d", (8, 3, 3, 3), None, "first layer"),
        ("body.0", "Conv2d", (8, 8, 3, 3), FOUR, ""),
        ("body.2", "ConvTranspose2d", (8, 4, 2, 2), FOUR, ""),
        ("head", "Linear", (2, 4), None, "last layer"),
    ]


def test_every_kind_of_layer_is_found() -> None:
    kinds = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    network = nn.Sequential(*[kind(2, 2, 1) for kind in kinds], nn.Linear(2, 2))
    assert list(plan_layers(network, FOUR, "same").chosen) == [str(i) for i in range(7)]


@pytest.mark.parametrize(("policy", "ends"), [("float", None), ("8bit", Bits(8, 8, 32)), ("same", Bits(4, 6, 32))])
def test_first_and_last_follow_the_policy(policy: Any, ends: Bits | None) -> None:
    rows = plan_layers(Net(), Bits(4, 6, 32), policy).layers
    assert [row.bits for row in rows] == [ends, Bits(4, 6, 32), Bits(4, 6, 32), ends]


def test_first_and_last_are_those_of_the_chosen_layers() -> None:
    assert list(plan_layers(Net(), FOUR, exclude="stem").chosen) == ["body.2"]
    assert notes(plan_layers(Net(), FOUR, exclude="stem")) == {
        "stem": "in exclude",
        "body.0": "first layer",
        "head": "last layer",
    }


def test_include_and_exclude_are_patterns_on_the_whole_name() -> None:
    assert list(plan_layers(Net(), FOUR, "same", include="body.*").chosen) == ["body.0", "body.2"]
    assert list(plan_layers(Net(), FOUR, "same", include=["stem", "h*d"]).chosen) == ["stem", "head"]
    assert list(plan_layers(Net(), FOUR, "same", include="body.*", exclude=["*.0"]).chosen) == ["body.2"]
    assert notes(plan_layers(Net(), FOUR, "same", include="body.*", exclude=["*.0"])) == {
        "stem": "not in include",
        "body.0": "in exclude",
        "head": "not in include",
    }


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_near_ones(argument: str) -> None:
    arguments: dict[str, Any] = {argument: ["stem", "boddy.*"]}
    with pytest.raises(
        ConfigurationError, match=rf"{argument}='boddy\.\*' matches none of the 4 layers. Close matches: body"
    ):
        plan_layers(Net(), FOUR, **arguments)
    with pytest.raises(ConfigurationError, match=f'{argument}="\\*'):
        plan_layers(Net(), FOUR, **{argument: "heat"})  # type: ignore[arg-type]


def _trained(network: nn.Module, exclude: Sequence[str]) -> set[str]:
    return set(GradientQuantization(first_and_last="same", exclude=exclude or None).plan(network).chosen)


def _grouped(network: nn.Module, exclude: Sequence[str]) -> set[str]:
    plan = calibration(network, images(2), exclude=tuple(exclude)).source.plan
    return set(plan.names("grouped", "one token", "patch", "attention"))


def _denoising(network: nn.Module, exclude: Sequence[str]) -> set[str]:
    plan = plan_denoiser(network, AccuQuantSettings(exclude=tuple(exclude)), lambda: network(images(1)))
    return {row.name for row in plan.rows if not row.left_out}


METHODS = {"int4_training": _trained, "igq_vit": _grouped, "accuquant": _denoising}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize(
    "pattern", ["blocks.0", "blocks.?", "blocks.0.attn", "*.attn", "blocks.0.attn.qkv", "*.mlp", "*.fc2", "patch*"]
)
def test_exclude_leaves_a_module_and_all_below_it_in_float_in_every_method(
    method: Callable[[nn.Module, Sequence[str]], set[str]], pattern: str
) -> None:
    everything = method(vit(), ())
    matched = [name for name, _ in vit().named_modules() if fnmatchcase(name, pattern)]
    below = {name for name in everything for outer in matched if f"{name}.".startswith(f"{outer}.")}
    assert below
    assert method(vit(), [pattern]) == everything - below


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("pattern", ["attn", "block.0", "blocks.0.norm1"])
def test_a_pattern_below_which_nothing_is_quantized_is_refused_in_every_method(
    method: Callable[[nn.Module, Sequence[str]], set[str]], pattern: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"exclude='{pattern}' matches none of the \d+ layers"):
        method(vit(), [pattern])


def test_include_takes_a_module_and_all_below_it() -> None:
    assert list(plan_layers(Net(), FOUR, "same", include="body").chosen) == ["body.0", "body.2"]
    assert list(plan_layers(Net(), FOUR, "same", include=["body", "head"], exclude="body.2").chosen) == [
        "body.0",
        "head",
    ]


def test_a_pattern_on_a_network_without_layers_says_so() -> None:
    with pytest.raises(ConfigurationError, match="the module has no Conv and no Linear"):
        plan_layers(nn.ReLU(), FOUR, include="x")


@pytest.mark.parametrize("bits", [Bits(1, 4, 4), Bits(4, 17, 4), Bits(4, 4, 0)])
def test_bit_widths_out_of_range_are_refused_by_name(bits: Bits) -> None:
    name = next(name for name, value in bits._asdict().items() if not 2 <= value <= 16)
    with pytest.raises(ConfigurationError, match=f"{name}_bits=.*or 32 to leave the tensor in float"):
        plan_layers(Net(), bits)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigurationError, match='expected "float", "8bit" or "same"'):
        plan_layers(Net(), FOUR, "both")  # type: ignore[arg-type]


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential has no Conv and no Linear layer"):
        plan_layers(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), FOUR)


def test_a_network_of_which_nothing_is_left_says_why() -> None:
    with pytest.raises(UnsupportedModelError, match="stem: in exclude"):
        plan_layers(Net(), FOUR, exclude="*")
    with pytest.raises(UnsupportedModelError, match=r'All 2 layers.*first_and_last="8bit"'):
        plan_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), FOUR)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_weights_that_are_not_floating_point_are_refused_with_what_to_write(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=rf'1 has a {dtype} weight.*exclude=\["1"\]'):
        plan_layers(network, FOUR, "same")
    assert list(plan_layers(network, FOUR, "same", exclude="1").chosen) == ["0"]


def test_a_complex_layer_alone_is_called_by_its_class() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has a torch.complex64 weight"):
        plan_layers(nn.Linear(2, 2, dtype=torch.complex64), FOUR, "same")


@pytest.mark.parametrize("first_and_last", ["float", "same"])
@pytest.mark.parametrize("lazy", [nn.LazyLinear, nn.LazyConv2d])
def test_an_uninitialised_layer_is_refused_with_what_to_do(lazy: type[nn.Module], first_and_last: Any) -> None:
    layer = lazy(4) if lazy is nn.LazyLinear else lazy(4, 3)
    network = nn.Sequential(layer, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match=r"0 is uninitialized.*run one forward pass"):
        plan_layers(network, FOUR, first_and_last)


def test_a_lazy_layer_that_was_run_is_an_ordinary_one() -> None:
    network = nn.Sequential(nn.LazyLinear(4))
    network(torch.zeros(1, 3))
    assert plan_layers(network, FOUR, "same").chosen == {"0": FOUR}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused_with_what_to_do(nested: bool) -> None:
    scripted = torch.jit.script(nn.Linear(2, 2))
    network = nn.Sequential(nn.Linear(2, 2), scripted) if nested else scripted
    with pytest.raises(UnsupportedModelError, match=r"TorchScript module.*quantize the original Python module"):
        plan_layers(network, FOUR)


def test_a_subclass_with_a_forward_of_its_own_is_left_out() -> None:
    plan = plan_layers(nn.Sequential(OwnForward(2, 2), nn.Linear(2, 2)), FOUR, "same")
    assert notes(plan) == {"0": "OwnForward has its own forward"}


def test_parametrized_layers_and_subclasses_without_a_forward_are_chosen_as_what_they_are() -> None:
    class Own(nn.Linear):
        pass

    network = nn.Sequential(Own(2, 2), nn.Linear(2, 2))
    nn.utils.parametrizations.spectral_norm(network[1])
    state = {key: value.clone() for key, value in network.state_dict().items()}
    plan = plan_layers(network, FOUR, "same")
    assert [(row.kind, row.bits) for row in plan.layers] == [("Own", FOUR), ("Linear", FOUR)]
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_multihead_attention_keeps_its_projection() -> None:
    network = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "attention_out": nn.Linear(4, 4)})
    plan = plan_layers(network, FOUR, "same")
    assert list(plan.chosen) == ["attention_out"]
    assert notes(plan) == {"attention.out_proj": "MultiheadAttention uses its weight without calling it"}


def test_multihead_attention_alone_says_why_nothing_is_left() -> None:
    with pytest.raises(UnsupportedModelError, match="out_proj: MultiheadAttention uses its weight"):
        plan_layers(nn.MultiheadAttention(4, 2), FOUR, "same")


class MetricWithNet(torchmetrics.MeanMetric):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)


def test_networks_inside_metrics_are_left_out() -> None:
    network = nn.ModuleDict({"fid": MetricWithNet(), "head": nn.Linear(2, 2)})
    plan = plan_layers(network, FOUR, "same")
    assert list(plan.chosen) == ["head"]
    assert notes(plan) == {"fid.net": "inside a metric"}


def test_a_shared_layer_is_planned_once() -> None:
    layer = nn.Linear(2, 2)
    assert list(plan_layers(nn.Sequential(layer, nn.ReLU(), layer), FOUR, "same").chosen) == ["0"]


def test_the_plan_prints_as_a_table_and_changes_nothing() -> None:
    network = Net()
    before = {name: (type(child), id(child)) for name, child in network.named_modules()}
    state = {key: value.clone() for key, value in network.state_dict().items()}
    lines = str(plan_layers(network, FOUR)).splitlines()
    assert lines[0].split() == ["layer", "kind", "weight", "shape", "bits", "w/a/g", "note"]
    assert [line.split() for line in lines[1:5]] == [
        ["stem", "Conv2d", "8x3x3x3", "float", "first", "layer"],
        ["body.0", "Conv2d", "8x8x3x3", "4/4/4"],
        ["body.2", "ConvTranspose2d", "8x4x2x2", "4/4/4"],
        ["head", "Linear", "2x4", "float", "last", "layer"],
    ]
    assert lines[5].startswith("2 of 4 layers quantized to 4/4/4 bits")
    assert {name: (type(child), id(child)) for name, child in network.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_a_transformer_encoder_layer_is_left_in_float() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8))
    rows = {row.name: row.note for row in plan_layers(network, Bits(4, 4), "same").layers}
    assert "bypasses its linears in evaluation" in rows["1.linear1"]
    assert not rows["0"]
