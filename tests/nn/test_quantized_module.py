"""Float weights that are loaded into quantized modules, whole, in part, wrapped, alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_quant.gradient import LargeGradientInterval
from lightning_quant.gradient.preparation import quantize_layers
from lightning_quant.nn import Bits, swap, swap_attention
from lightning_quant.nn.quantized_module import HINT
from lightning_quant.nn.structure import mark, quantizers_of
from lightning_quant.quantizers import FixedQuantizer, LearnedQuantizer, RoundedQuantizer

State = dict[str, Tensor]
FOUR = Bits(4, 4, 4)
SAID = "ranges will be set from the first training batch"


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))


def images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def trained(*names: str) -> nn.Sequential:
    """Quantized, its ranges started."""
    model = network()
    quantize_layers(model, dict.fromkeys(names or ("0", "2", "4"), FOUR), LargeGradientInterval())
    model(images())
    return model


def ready(model: nn.Module) -> dict[str, bool]:
    """Whether each weight's quantizer has a range."""
    return {n.partition(".")[0]: q.ready for n, q in quantizers_of(model) if n.endswith("weight_quantizer")}


def load_file(model: nn.Module, state: State, folder: Path) -> None:
    torch.save(state, folder / "float.pth")
    timm.models.load_checkpoint(model, str(folder / "float.pth"))


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


DOORS: dict[str, Callable[[nn.Sequential, State, Path], object]] = {
    "itself": lambda model, state, _: model.load_state_dict(state),
    "not strict": lambda model, state, _: model.load_state_dict(state, strict=False),
    "assigned": lambda model, state, _: model.load_state_dict(state, assign=True),
    "as a part": lambda model, state, _: nn.ModuleDict({"net": model}).load_state_dict(prefixed("net.", state)),
    "layer by layer": lambda model, state, _: [
        model[i].load_state_dict({k[2:]: v for k, v in state.items() if k.startswith(f"{i}.")}) for i in (0, 2, 4)
    ],
    "DataParallel": lambda model, state, _: nn.DataParallel(model).load_state_dict(prefixed("module.", state)),
    "a container of its layers": lambda model, state, _: nn.Sequential(*model).load_state_dict(state),
    "timm": load_file,
}


@pytest.mark.parametrize("door", DOORS)
def test_ranges_start_from_the_next_batch_through_every_door(door: str, tmp_path: Path) -> None:
    model, other = trained(), network(seed=1)
    DOORS[door](model, other.state_dict(), tmp_path)
    assert ready(model) == dict.fromkeys("024", False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    quantize_layers(other, dict.fromkeys("024", FOUR), LargeGradientInterval())
    x = images(seed=1)
    assert torch.equal(model(x), other(x))
    for (name, quantizer), (_, expected) in zip(quantizers_of(model), quantizers_of(other), strict=True):
        if isinstance(quantizer, LearnedQuantizer):
            assert isinstance(expected, LearnedQuantizer)
            assert quantizer.range == expected.range, name
            assert quantizer.signed == expected.signed, name


def test_copies_of_a_quantized_network_load_float_weights_too() -> None:
    average = AveragedModel(trained())
    state = AveragedModel(network(seed=1)).state_dict()
    average.load_state_dict(state)
    assert not any(q.ready for _, q in quantizers_of(average))
    assert not any(q.ready for _, q in quantizers_of(copy.deepcopy(average)))


def test_only_the_layers_whose_weights_are_loaded_start_anew() -> None:
    model, state = trained(), network(seed=1).state_dict()
    backbone = {key: value for key, value in state.items() if not key.startswith("4.")}
    head: Any = model[4]
    kept = head.weight_quantizer.range.clone()
    found = model.load_state_dict(backbone, strict=False)
    assert ready(model) == {"0": False, "2": False, "4": True}
    assert head.weight_quantizer.range == kept
    assert {key.partition(".")[0] for key in found.missing_keys} == {"4"}


def test_biases_alone_leave_the_ranges() -> None:
    model = trained()
    model.load_state_dict({"2.bias": torch.ones(4)}, strict=False)
    assert ready(model) == dict.fromkeys("024", True)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_quant.nn.quantized_module.rank_zero_info", lines.append)
    return lines


def test_one_line_says_so_once_for_each_load(said: list[str]) -> None:
    model, state = trained(), network(seed=1).state_dict()
    for strict in (True, False):
        model.load_state_dict(state, strict=strict)
    assert len(said) == 2
    assert all(SAID in line for line in said)
    model.load_state_dict(trained().state_dict())
    assert len(said) == 2


@pytest.mark.parametrize("names", [("0",), ("4",)])
def test_a_state_that_quantizes_other_layers_is_refused(names: tuple[str, ...], said: list[str]) -> None:
    holder = nn.ModuleDict({"net": trained()})
    state = prefixed("net.", trained(*names).state_dict())
    with pytest.raises(RuntimeError, match=rf"quantizers of net\.\d, .*those of net\.{names[0]} only.*strict=False"):
        holder.load_state_dict(state)
    holder = nn.ModuleDict({"net": trained()})
    holder.load_state_dict(state, strict=False)
    assert ready(holder["net"]) == {name: name in names for name in "024"}
    assert len(said) <= 2


def test_a_missing_range_of_a_quantizer_is_still_missed() -> None:
    state = trained().state_dict()
    del state["2.weight_quantizer.range"]
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.weight_quantizer\.range"):
        trained().load_state_dict(state)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_marked_state_loads_into_a_part(prefix: str) -> None:
    state = trained().state_dict()
    mark(state, "GradientQuantization")
    model = trained()
    holder = model if not prefix else nn.ModuleDict({"net": model})
    found: Any = holder.load_state_dict(prefixed(prefix, state))
    assert not found.unexpected_keys
    with pytest.raises(RuntimeError, match=f"{HINT}add GradientQuantization"):
        network().load_state_dict(state)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)


def opened() -> Encoder:
    model, x = Encoder(), torch.linspace(-1, 1, 8)
    quantizers = [FixedQuantizer(8) for _ in range(6)]
    for quantizer in quantizers:
        quantizer.initialize(x)
    attention: Any = swap_attention(model.attention, *quantizers[:4])
    swap(attention.in_proj, weight_quantizer=quantizers[4])
    swap(attention.out_proj, weight_quantizer=quantizers[5])
    return model


@pytest.mark.parametrize("alone", [True, False])
def test_the_packed_projection_of_an_attention_is_float_weights_too(alone: bool) -> None:
    model, other = opened(), Encoder()
    if alone:
        model.attention.load_state_dict(other.attention.state_dict())
    else:
        model.load_state_dict(other.state_dict())
    assert {name: q.ready for name, q in quantizers_of(model)} == {name: False for name, _ in quantizers_of(model)}
    assert torch.equal(model.attention.in_proj_weight, other.attention.in_proj_weight)


def test_what_of_an_attention_is_not_loaded_keeps_its_ranges() -> None:
    model = opened()
    model.load_state_dict(Encoder().head.state_dict(prefix="head."), strict=False)
    assert all(q.ready for _, q in quantizers_of(model))


def test_learned_codes_are_dropped_with_the_weights_that_they_were_of() -> None:
    layer, other = nn.Linear(4, 4).eval(), nn.Linear(4, 4)
    quantizer = RoundedQuantizer(4)
    swap(layer, weight_quantizer=quantizer)
    quantizer.initialize(layer.weight)
    for strict in (True, False):
        layer.load_state_dict(other.state_dict(), strict=strict)
        assert quantizer.codes.numel() == 0
        x = torch.randn(3, 4)
        with torch.no_grad():
            assert torch.equal(layer(x), other(x))
        quantizer.initialize(layer.weight)
        assert quantizer.codes.shape == (4, 4)


def test_intervals_of_ranks_may_differ_again_after_float_weights() -> None:
    model = trained()
    quantizer: Any = model[2].gradient_quantizer
    quantizer.initialize(torch.ones(3))
    quantizer.run.agreed = True
    model.load_state_dict(network(seed=1).state_dict())
    quantizer.initialize(torch.ones(3))
    assert not quantizer.run.agreed
