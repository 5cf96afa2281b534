"""What IGQ-ViT costs: calibration in forward passes, and a quantized forward beside the layer-wise one.

    python benchmarks/igq_time.py [--model vit_small_patch16_224] [--images 32] [--threads 2] [--repeats 5] [--allocate]

Weights are random, which changes no time but that of k-means. Float, layer-wise and IGQ forwards alternate in one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_quant.igq_vit.calibration import Calibration, Source
from lightning_quant.igq_vit.perturbation import log_posteriors
from lightning_quant.igq_vit.preparation import prepare
from lightning_quant.igq_vit.settings import Settings


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()  # type: ignore[no-any-return]


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    with torch.no_grad():
        run()
    return time.perf_counter() - begin


def calibrated(name: str, images: Tensor, **settings: Any) -> tuple[nn.Module, float, float]:
    """A calibrated network, and seconds that took: all steps, and the first, which fits the quantizers."""
    model = network(name)
    begin = time.perf_counter()
    plan = prepare(model, Settings(calibration_images=len(images), **settings), images[:1], model)
    calibration = Calibration(Source(model, plan, model, images, log_posteriors))
    calibration.step()
    fitted = time.perf_counter() - begin
    while not calibration.finished:
        calibration.step()
    return model, time.perf_counter() - begin, fitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images a batch of the timed forwards")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--allocate", action="store_true", help="time the calibration with allocation too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = network(options.model)
    size = model.default_cfg["input_size"]  # type: ignore[index,union-attr]
    images = torch.randn(options.images, *size, generator=torch.Generator().manual_seed(0))
    float_pass = min(seconds(lambda: model(images)) for _ in range(3))
    layer_wise, _, _ = calibrated(options.model, images, scheme="layer_wise")
    igq, took, _ = calibrated(options.model, images, allocate=False)
    print(f"| {options.model}, {options.images} images, {options.threads} threads | seconds | float passes |")
    print("|---|---|---|")
    print(f"| float forward of all | {float_pass:.2f} | 1.0 |")
    print(f"| calibration, 8 groups | {took:.1f} | {took / float_pass:.1f} |")
    if options.allocate:
        _, took, fitted = calibrated(options.model, images, allocate=True)
        print(f"| calibration, allocated | {took:.1f} | {took / float_pass:.1f} |")
        print(f"| of which quantizers of each number of groups | {fitted:.1f} | {fitted / float_pass:.1f} |")
    batch = images[: options.batch]
    times: dict[str, list[float]] = {"float": [], "layer-wise": [], "IGQ 8": []}
    for _ in range(options.repeats + 1):
        for name, each in zip(times, (model, layer_wise, igq), strict=True):
            times[name].append(seconds(lambda each=each: each(batch)))  # type: ignore[misc]
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"\n| forward of {options.batch} images | ms | of layer-wise |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {1000 * value:.0f} | {value / medians['layer-wise']:.2f} |")


if __name__ == "__main__":
    main()
