"""Reading what the callback logged, and drawing it."""

import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.image import imread

from lightning_quant.errors import ConfigurationError
from lightning_quant.report import Curve, LayerMetrics, draw_intervals, read_layer_metrics
from lightning_quant.report.intervals import parse_layer_metrics


def run(*layers: str, gamma: float = 0.5, steps: int = 20) -> LayerMetrics:
    at = tuple(range(5, 5 * steps + 1, 5))
    curves = {
        "gamma": Curve(at, tuple(gamma + 1e-3 * i for i in range(steps))),
        "error_large": Curve(at, tuple(0.04 + 0.01 * math.sin(i) for i in range(steps))),
    }
    return LayerMetrics(dict.fromkeys(layers, curves))


def test_reads_what_lightnings_csv_logger_wrote(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version="")
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.log_metrics({f"gradient_quantization/net.{i}.conv/gamma": i / 100 for i in (10, 9)}, step=5)
    logger.log_metrics({"gradient_quantization/net.9.conv/gamma": 0.2, "train/loss": 1.0}, step=10)
    logger.save()
    metrics = read_layer_metrics(tmp_path / "run" / "metrics.csv")
    assert list(metrics.layers) == ["net.9.conv", "net.10.conv"]
    assert metrics.layers["net.9.conv"]["gamma"] == Curve((5, 10), (0.09, 0.2))
    assert metrics.layers["net.10.conv"]["gamma"] == Curve((5,), (0.10,))


def test_reads_values_that_are_no_numbers(tmp_path: Path) -> None:
    metrics = parse_layer_metrics([{"step": "1", "gradient_quantization/a/target": "nan"}])
    assert math.isnan(metrics.layers["a"]["target"].values[0])


def test_a_log_without_layers_says_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match="train with GradientQuantization and a logger"):
        parse_layer_metrics([{"step": "1", "train/loss": "0.5"}])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"No file '.*metrics\.csv'"):
        read_layer_metrics(tmp_path / "metrics.csv")


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    curve = Curve(tuple(range(30)), (0.25,) * 30)
    assert curve.smooth() == curve
    assert curve.end() == 0.25


def drawn_share(path: Path) -> float:
    return float((imread(path)[..., :3] < 0.9).any(axis=2).mean())


@pytest.mark.parametrize("layers", [["a"], ["a", "b"], ["net.a", "net.b.c", "net.d", "net.e"]])
def test_draws_networks_of_any_size(tmp_path: Path, layers: list[str]) -> None:
    path = tmp_path / "new" / "intervals.png"
    draw_intervals({"one": run(*layers), "two": run(*layers, gamma=0.8)}, path, title="a title")
    assert imread(path).shape[1] >= 700
    assert 0.01 < drawn_share(path) < 0.5


def test_three_columns_are_readable_at_1000_pixels(tmp_path: Path) -> None:
    path = tmp_path / "intervals.png"
    draw_intervals({"one": run(*"abcde")}, path)
    assert 1000 <= imread(path).shape[1] <= 2000


def test_colours_of_every_run_are_in_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "intervals.png"
    draw_intervals({"one": run("a"), "two": run("a", gamma=0.9)}, path)
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for color in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00]):
        assert (pixels == color).all(axis=1).sum() > 100


def test_curves_that_are_missing_nan_or_a_single_point_do_not_matter(tmp_path: Path) -> None:
    nan = LayerMetrics({"a": {"gamma": Curve((1,), (float("nan"),)), "error_large": Curve((1,), (float("nan"),))}})
    draw_intervals({"missing": LayerMetrics({"a": {}}), "nan": nan}, tmp_path / "intervals.svg")
    assert (tmp_path / "intervals.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_an_unknown_layer_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"The run 'one' has no layer 'c': expected one of a, b"):
        draw_intervals({"one": run("a", "b")}, tmp_path / "x.png", layers=["c"])


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No run to draw"):
        draw_intervals({}, tmp_path / "x.png")


def test_no_global_state_of_pyplot_is_made(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    draw_intervals({"one": run("a")}, tmp_path / "x.png")
    assert pyplot.get_fignums() == before
