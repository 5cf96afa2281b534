"""Bit operations of an image in each network of ``configs/igq_vit``, layer-wise and with groups of channels.

    python benchmarks/igq_bops.py [--bits 4 6 8] [--groups 8 12 16]

Counted on the meta device: no weights, no images. Weights and inputs have the same bits, but the input of the patch
embedding 8. The groups of softmax rows are not counted, see ``lightning_quant.metrics.model_bops``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
import yaml

from lightning_quant.cli.packaged import FOLDER
from lightning_quant.metrics import measure_shapes, model_bops
from lightning_quant.metrics.bops import LayerShape


def networks() -> Iterator[tuple[str, list[LayerShape]]]:
    """Name of each config on ImageNet, smallest network first in each family, and the shapes of its network."""
    sizes = ("tiny", "small", "base")
    for family in ("vit", "deit", "swin"):
        for size in sizes:
            name = f"{family}_{size}"
            text = (FOLDER / "igq_vit" / f"{name}.yaml").read_text(encoding="utf-8")
            arguments = yaml.safe_load(text)["model"]["init_args"]
            with torch.device("meta"):
                network: Any = timm.create_model(arguments["model"], num_classes=arguments["num_classes"])
                image = torch.zeros(1, *network.default_cfg["input_size"])
            yield name, measure_shapes(network, image)


def cells(shapes: Sequence[LayerShape], bits: int, groups: Sequence[int]) -> list[str]:
    """Layer-wise, then each number of groups, in giga bit operations."""
    plain = model_bops(shapes, bits, bits).total
    grouped = [model_bops(shapes, bits, bits, each).total for each in groups]
    return [f"{plain / 1e9:.1f}", *(f"{each / 1e9:.1f} (+{100 * (each / plain - 1):.1f} %)" for each in grouped)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 12, 16])
    options = parser.parse_args()
    heads = ["GBOPs an image", "bits", "layer-wise", *(f"{each} groups" for each in options.groups)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, shapes in networks():
        for bits in options.bits:
            print(f"| {' | '.join([name, f'{bits}/{bits}', *cells(shapes, bits, options.groups)])} |")


if __name__ == "__main__":
    main()
