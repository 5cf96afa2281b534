"""What a page says of the network as a whole."""

from __future__ import annotations

import pytest

from lightning_quant.analysis import Analysis, LayerAnalysis
from lightning_quant.report.content import logged_metrics, network_advice, with_full_names
from lightning_quant.report.section import Section


def analysis(*errors: float | None) -> Analysis:
    layers = [LayerAnalysis(f"fc{i}", "Linear", (2, 2), 0, {}, error) for i, error in enumerate(errors)]
    return Analysis(layers, ["head"], 0.1, 0.9, 8, 1.0, 2.0, 400, 100, 1000, 100)


@pytest.mark.parametrize(
    ("errors", "worst"),
    [
        ((0.1, 0.3, 0.1), "fc1"),
        # The half of the squares, and no more.
        ((0.1, 0.1, 0.2**0.5 / 10**0.5), ""),
        ((0.2, 0.2, 0.2), ""),
        # Of two layers one is always the worse.
        ((0.1, 0.9), ""),
        ((None, None, None), ""),
        ((0.0, 0.0, 0.0), ""),
    ],
)
def test_a_layer_that_causes_most_of_the_error_is_named(errors: tuple[float | None, ...], worst: str) -> None:
    findings = list(network_advice(analysis(*errors), Section()))
    assert len(findings) == bool(worst)
    for finding in findings:
        assert finding.cause.startswith(f"{worst} causes 82% of")
        assert finding.line == f"exclude=['{worst}']"


def test_names_are_those_of_the_module() -> None:
    full = with_full_names("model.unet", analysis(0.1, 0.2))
    assert [layer.name for layer in full.layers] == ["model.unet.fc0", "model.unet.fc1"]
    assert full.left_out == ["model.unet.head"]
    assert with_full_names("", full) is full


def test_loggers_get_what_was_measured() -> None:
    metrics = logged_metrics(analysis(0.1, None))
    assert metrics["quantization/fc0/only_quantized"] == 0.1
    assert "quantization/fc1/only_quantized" not in metrics
    assert metrics["quantization/bytes"] == 100
