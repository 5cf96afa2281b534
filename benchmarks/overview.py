"""Draw the picture at the head of the README from what ``lightning-quant demo`` left.

    lightning-quant demo && python benchmarks/overview.py [--demo demo] [--output docs/overview.png]

A gradient of a training in 4 bits, the channels of one image in a vision transformer, and the error of a diffusion
model over its steps: each of the network that the demo has trained or calibrated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_quant import DigitsDataModule, GradientQuantization, ImageClassifier, load_quantized
from lightning_quant.functional.groups import channel_groups, channel_ranges
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.quantizers.grouped import GroupQuantizer

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
SHADES = (BLUE, "#E69F00", "#009E73", "#CC79A7")
# A layer of the middle of each network.
CONVOLUTION, PROJECTION = "network.layer2.0.conv1", "network.blocks.1.attn.qkv"


def gradient(demo: Path) -> tuple[Tensor, float]:
    """abs(G) of one layer in a further batch of the training, as a share of the largest, and gamma."""
    seen: list[tuple[Tensor, float]] = []

    class Listener(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            quantizer: Any = module.get_submodule(CONVOLUTION).gradient_quantizer
            assert isinstance(quantizer, GradientQuantizer)
            quantize = quantizer.quantize

            def heard(values: Tensor) -> Any:
                seen.append((values.abs().flatten(), float(quantizer.gamma)))
                return quantize(values)

            quantizer.quantize = heard

    checkpoint = demo / "int4_training" / "large_gradient_0" / "last.ckpt"
    module = ImageClassifier.load_from_checkpoint(checkpoint)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        callbacks=[GradientQuantization(4, 4, 4), Listener()],
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DigitsDataModule(256))
    magnitude, gamma = seen[0]
    return magnitude / magnitude.max(), gamma


def draw_gradient(axes: Axes, magnitude: Tensor, gamma: float) -> None:
    """Its distribution, and the codes."""
    axes.hist(magnitude.numpy(), bins=60, color="#BBBBBB", log=True)
    large = float(magnitude.topk(max(1, magnitude.numel() // 1000)).values[-1])
    axes.axvspan(large, 1, color=SHADES[1], alpha=0.25, linewidth=0, label="the largest 0.1 %")
    for code in range(1, 8):
        axes.axvline(code * gamma / 7, color=BLUE, linewidth=2.2 if code == 7 else 0.8)
    axes.plot([], [], color=BLUE, label="codes of 4 bits")
    axes.set_xlabel("gradient, of the largest")
    axes.set_ylabel("how many")
    axes.legend(framealpha=0.9, edgecolor="white", fontsize=9, loc="upper right")


def draw_channels(axes: Axes, demo: Path) -> None:
    """Ranges of the channels of one image, by the group that each takes."""
    network: Any = load_quantized(demo / "igq_vit" / "quantized")
    layer, seen = network.get_submodule(PROJECTION), list[Tensor]()
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, GroupQuantizer)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(quantizer.per_image(args[0])))
    data = DigitsDataModule(1)
    data.setup("test")
    with torch.no_grad():
        network.eval()(next(iter(data.test_dataloader()))[0])
    handle.remove()
    low, high = channel_ranges(seen[0])[0].unbind(dim=1)
    group = channel_groups(seen[0], quantizer.centres)[0, 0]
    begin = -quantizer.zero_point * quantizer.scale
    end = begin + quantizer.scale * quantizer.grid.high
    width = end - begin
    order = sorted(range(len(low)), key=lambda i: (float(width[group[i]]), float(high[i] - low[i])))
    for place, name in enumerate(dict.fromkeys(int(group[i]) for i in order)):
        own = [at for at, i in enumerate(order) if int(group[i]) == name]
        bounds = float(begin[name]), float(end[name])
        axes.fill_between([own[0] - 0.5, own[-1] + 0.5], *bounds, color=SHADES[place % 4], alpha=0.3, linewidth=0)
    axes.vlines(np.arange(len(order)), low[order], high[order], color=GREY, linewidth=1.6)
    axes.set_xlabel("channels of one image, by group")
    axes.set_ylabel("value: least to largest")


def draw_errors(axes: Axes, demo: Path) -> None:
    """The error that piles up, before and after, and that of single steps."""
    runs = json.loads((demo / "quantization_report.json").read_text(encoding="utf-8"))["runs"]
    figures = next(run["figures"] for run in runs if "held_out_errors" in run["figures"])
    single = figures["single_step"]["quantized"]
    for label, values, color, style in (
        ("ranges alone", figures["held_out_errors"]["ranges"], ORANGE, "-"),
        ("AccuQuant", figures["held_out_errors"]["end"], BLUE, "-"),
        ("AccuQuant, each step by itself", [0.0, *single], BLUE, ":"),
    ):
        axes.plot(range(len(values)), values, style, color=color, label=label, linewidth=2)
    axes.set_xlabel("denoising steps, from noise to image")
    axes.set_ylabel("distance to the float model")
    axes.set_ylim(0, 1.35 * max(figures["held_out_errors"]["ranges"]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/overview.png"))
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    figure = Figure(figsize=(14, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3)
    draw_gradient(panels[0], *gradient(options.demo))
    draw_channels(panels[1], options.demo)
    draw_errors(panels[2], options.demo)
    titles = (
        "INT4 training\ngradients in 4 bits, the large ones with little error",
        "IGQ-ViT\nchannels share a few ranges, chosen anew for each image",
        "AccuQuant\nlearns from the error that piles up over the steps",
    )
    for axes, title in zip(panels, titles, strict=True):
        head, _, line = title.partition("\n")
        axes.set_title(line, loc="left", fontsize=10, color=GREY)
        axes.text(0, 1.11, head, transform=axes.transAxes, fontsize=14, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output)


if __name__ == "__main__":
    main()
