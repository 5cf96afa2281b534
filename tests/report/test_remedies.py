"""Every remedy is an argument of the method that the network was quantized with, and can be pasted."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lightning_quant import AccuQuant, GradientQuantization, IGQViT
from lightning_quant.analysis import Analysis, Cause, LayerAnalysis
from lightning_quant.analysis.causes import Kind
from lightning_quant.metrics.tensor_error import TensorFigures
from lightning_quant.report.remedies import effect, in_float, of_groups, of_training, of_windows
from lightning_quant.report.section import Section

METHODS: dict[Any, Any] = {of_training: GradientQuantization, of_groups: IGQViT, of_windows: AccuQuant}
SETTINGS: dict[Any, list[dict[str, Any]]] = {
    of_training: [{}, {"exclude": "stem", "quantizer_lr": 1e-3}],
    of_groups: [{}, {"group_ranges": "envelope", "layer_range": "min_max"}, {"exclude": ["stem"]}],
    of_windows: [{}, {"activation_parameters": "per_group", "reconstruction": 10}],
}
CASES = [
    (of, Cause(kind, slot, "text"), groups, settings)
    for of in METHODS
    for kind in get_args(Kind)
    for slot in ("input", "weight", "softmax")
    for groups in (0, 8)
    for settings in SETTINGS[of]
]


def layer(groups: int = 0, **figures: float) -> LayerAnalysis:
    return LayerAnalysis("blocks.0.fc", "Linear", (8, 8), groups, {}, **figures)


@pytest.mark.parametrize(("of", "cause", "groups", "settings"), CASES)
def test_the_line_makes_the_callback_and_changes_something(
    of: Any, cause: Cause, groups: int, settings: dict[str, Any]
) -> None:
    words, line = of(cause, layer(groups), settings)
    given: dict[str, Any] = eval(f"dict({line})")
    METHODS[of](**{**settings, **given})
    (name,) = given
    assert words
    assert given[name] != settings.get(name)


def test_what_was_left_in_float_stays_so() -> None:
    assert in_float("head", {"exclude": "stem"}).line == "exclude=['stem', 'head']"
    assert in_float("head", {}).line == "exclude=['head']"


def test_the_effect_of_float_is_the_measured_one() -> None:
    analysis = Analysis([], [], 0.418, None, 1, 1.0, 1.0, 1, 1, None, None)
    assert effect(layer(only_float=0.389), analysis) == ": 41.8% to 38.9% error of the outputs"
    assert effect(layer(), analysis) == ""


def test_a_finding_has_cause_words_effect_and_line() -> None:
    wide = TensorFigures(4, -1.0, 1.0, 20.0, 0.0, 1.0, 0.5, True, channel_ratio=30.0)
    fc = LayerAnalysis("blocks.0.fc", "Linear", (8, 8), 0, {"input": wide}, only_quantized=0.1, only_float=0.389)
    analysis = Analysis([fc], [], 0.418, None, 1, 1.0, 1.0, 1, 1, None, None)
    (finding,) = Section().findings(analysis)["blocks.0.fc"]
    assert finding.cause == "input: outlier channels, the widest is 30 times the median one"
    assert finding.remedy == "Leave it in float: 41.8% to 38.9% error of the outputs."
    assert finding.line == "exclude=['blocks.0.fc']"
