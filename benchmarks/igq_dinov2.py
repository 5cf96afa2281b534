"""DINOv2-small with a linear probe on CIFAR-10 at 112 px, quantized by IGQ-ViT and what it is compared with.

    python benchmarks/igq_dinov2.py --assets FOLDER [--draws 3] [--images 1000] [--bits 4 6] [--output results/igq]

FOLDER holds ``dinov2_small.safetensors`` (timm's vit_small_patch14_dinov2) and ``cifar10/train``, ``cifar10/test`` with
class folders. Every run is a ``trainer.test`` with the callback ``lightning_quant.IGQViT``. Results are appended to
``OUTPUT/results.jsonl`` one by one; what is there already is not run again, and the table is of all that is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from lightning_quant import IGQViT, ImageClassifier

ROWS: dict[str, dict[str, Any]] = {
    "layer-wise, min-max": {"scheme": "layer_wise", "layer_range": "min_max"},
    "layer-wise, percentile": {"scheme": "layer_wise"},
    "per token": {"scheme": "per_token"},
    "RepQ-style": {"scheme": "repq"},
    "IGQ 8, mean (the paper's ranges)": {"groups": 8, "allocate": False, "group_ranges": "mean"},
    "IGQ 8, envelope": {"groups": 8, "allocate": False, "group_ranges": "envelope"},
    "IGQ 8, parallel": {"groups": 8, "allocate": False, "sequential": False},
    "IGQ 4": {"groups": 4, "allocate": False},
    "IGQ 8": {"groups": 8, "allocate": False},
    "IGQ 12": {"groups": 12, "allocate": False},
    "IGQ average 8, allocated": {"groups": 8},
    "IGQ average 12, allocated": {"groups": 12},
    "upper bound": {"scheme": "upper_bound"},
}
TRAIN_PER_CLASS, TRANSFORM = (
    500,
    transforms.Compose(
        [
            transforms.Resize(112, transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    ),
)


class Cifar(pl.LightningDataModule):
    """The first images of a seeded permutation of each class, 112 px."""

    def __init__(self, root: Path, test_images: int) -> None:
        super().__init__()
        self.train = datasets.ImageFolder(str(root / "train"), TRANSFORM)
        self.test = balanced(datasets.ImageFolder(str(root / "test"), TRANSFORM), test_images // 10)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, 50)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, 50)


def balanced(data: datasets.ImageFolder, per_class: int) -> Subset[Any]:
    targets, generator = np.array(data.targets), np.random.RandomState(0)
    chosen = [generator.permutation(np.flatnonzero(targets == c))[:per_class] for c in range(10)]
    return Subset(data, np.concatenate(chosen).tolist())


def backbone(weights: Path) -> nn.Module:
    overlay = {"file": str(weights), "custom_load": False}
    name = "vit_small_patch14_dinov2.lvd142m"
    return timm.create_model(name, num_classes=0, img_size=112, pretrained=True, pretrained_cfg_overlay=overlay)


def probe(assets: Path, output: Path) -> tuple[Tensor, Tensor]:
    """Weight and bias of a logistic regression on the features of 5 000 training images; kept in a file."""
    path = output / "probe.pt"
    if not path.is_file():
        data = DataLoader(balanced(datasets.ImageFolder(str(assets / "cifar10/train"), TRANSFORM), TRAIN_PER_CLASS), 50)
        network = backbone(assets / "dinov2_small.safetensors").eval()
        with torch.inference_mode():
            pairs = [(network(images), labels) for images, labels in data]
        features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        mean, std = features.mean(0), features.std(0)
        fitted = LogisticRegression(C=0.01, max_iter=2000).fit(((features - mean) / std).numpy(), labels.numpy())
        weight = torch.tensor(fitted.coef_, dtype=torch.float32) / std
        bias = torch.tensor(fitted.intercept_, dtype=torch.float32) - weight @ mean
        torch.save((weight.clone(), bias.clone()), path)
    weight, bias = torch.load(path, weights_only=True)
    return weight, bias


def classifier(assets: Path, head: tuple[Tensor, Tensor]) -> ImageClassifier:
    network: Any = backbone(assets / "dinov2_small.safetensors")
    network.reset_classifier(10)
    with torch.no_grad():
        network.head.weight.copy_(head[0])
        network.head.bias.copy_(head[1])
    return ImageClassifier(network, 10)


def run(options: argparse.Namespace, head: tuple[Tensor, Tensor], arguments: dict[str, Any] | None) -> dict[str, Any]:
    callbacks: list[pl.Callback] = []
    if arguments is not None:
        callbacks = [IGQViT(**arguments, cache_dir=str(options.output / "cache"))]
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    begin = time.perf_counter()
    (result,) = trainer.test(
        classifier(options.assets, head), Cifar(options.assets / "cifar10", options.images), verbose=False
    )
    return {"accuracy": 100 * result["test/acc"], "seconds": time.perf_counter() - begin}


def table(path: Path, bits: list[int]) -> str:
    found: dict[tuple[str, int], list[float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault((entry["row"], entry["bits"]), []).append(entry["accuracy"])
    lines = ["| | " + " | ".join(f"W{b}A{b}, mean | each" for b in bits) + " |", "|---|" + "---|---|" * len(bits)]
    for row in ("float", *ROWS):
        cells = []
        for b in bits:
            values = found.get((row, 32 if row == "float" else b), [])
            cells += [f"{statistics.mean(values):.1f}", ", ".join(f"{v:.1f}" for v in values)] if values else ["", ""]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("results/igq"))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="test images, the same number of each class")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.jsonl"
    path.touch()
    head = probe(options.assets, options.output)
    done = {(e["row"], e["bits"], e["draw"]) for e in map(json.loads, path.read_text().splitlines())}
    jobs: list[tuple[str, int, int, dict[str, Any] | None]] = [("float", 32, 0, None)]
    # The long ones last.
    for row in sorted(options.rows, key=lambda row: "allocated" in row):
        for draw in range(options.draws):
            for bits in options.bits:
                bit_widths = {"weight_bits": bits, "activation_bits": bits}
                jobs.append((row, bits, draw, {**ROWS[row], **bit_widths, "seed": draw}))
    for row, bits, draw, arguments in jobs:
        if (row, bits, draw) in done:
            continue
        entry = {"row": row, "bits": bits, "draw": draw, "images": options.images, **run(options, head, arguments)}
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{row}, {bits} bit, draw {draw}: {entry['accuracy']:.1f} % in {entry['seconds']:.0f} s", flush=True)
    print(table(path, options.bits))


if __name__ == "__main__":
    main()
