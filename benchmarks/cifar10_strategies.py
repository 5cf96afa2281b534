"""CIFAR-10, ResNet-20, 4/4/4: the interval strategies side by side, same seeds and recipe.

    python benchmarks/cifar10_strategies.py --root DIR [--epochs 3] [--seeds 3] [--output FOLDER] [--report]

``DIR`` holds CIFAR-10 as ``CIFARDataModule`` reads it. Each run leaves ``FOLDER/<strategy>_<seed>.json`` and its log;
runs that are there are skipped, and processes can share them (``--shard 0/2`` and ``--shard 1/2``). ``--report`` prints
the table of what is there and draws the intervals and errors of three layers over time, ``FOLDER/intervals.png``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_quant import (
    CIFARDataModule,
    FixedInterval,
    GradientQuantization,
    ImageClassifier,
    LargeGradientInterval,
    MinimumErrorInterval,
    MinMaxInterval,
)
from lightning_quant.report import draw_intervals, read_layer_metrics

# The 5th, 15th and 17th quantized layers, of which the authors show curves.
LAYERS = ["network.layer1.2.conv1", "network.layer3.1.conv1", "network.layer3.2.conv1"]
STRATEGIES = {
    "float": None,
    "large_gradient": LargeGradientInterval(),
    "min_max": MinMaxInterval(),
    "fixed_0.6": FixedInterval(0.6),
    "minimum_error": MinimumErrorInterval(every=50),
}


def train(strategy: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One run; the result is the accuracy on the 10 000 test images."""
    pl.seed_everything(seed)
    interval = STRATEGIES[strategy]
    sgd = partial(torch.optim.SGD, lr=options.lr, momentum=0.9, weight_decay=1e-4)
    model = ImageClassifier("cifar_resnet20", 10, optimizer=sgd, lr_scheduler="one_cycle", channels_last=True)
    data = CIFARDataModule(options.root, batch_size=128, validation_images=0, seed=seed)
    callbacks = [] if interval is None else [GradientQuantization(4, 4, 4, interval, log_every_n_steps=25)]
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=callbacks,
        accelerator=options.accelerator,
        logger=CSVLogger(options.output, name=f"{strategy}_{seed}", version=""),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    accuracy = trainer.test(model, data, verbose=False)[0]["test/acc"]
    return {"accuracy": 100 * accuracy, "seconds": seconds, "epochs": options.epochs, "lr": options.lr}


def report(folder: Path) -> None:
    """Print the table of the finished runs."""
    print("| strategy | runs | test accuracy, mean | each |\n|---|---|---|---|")
    for strategy in STRATEGIES:
        found = [json.loads(path.read_text())["accuracy"] for path in sorted(folder.glob(f"{strategy}_?.json"))]
        if found:
            each = ", ".join(f"{value:.2f}" for value in found)
            print(f"| {strategy} | {len(found)} | {statistics.mean(found):.2f} | {each} |")
    logs = {strategy: folder / f"{strategy}_0" / "metrics.csv" for strategy in STRATEGIES if strategy != "float"}
    runs = {strategy: read_layer_metrics(path) for strategy, path in logs.items() if path.exists()}
    if runs:
        draw_intervals(runs, folder / "intervals.png", LAYERS, "ResNet-20 on CIFAR-10, 4/4/4")
        print("\n| strategy | gamma at the end, layers 5/15/17 | E(G_large) at the end |\n|---|---|---|")
    for strategy, metrics in runs.items():
        gamma, error = ([metrics.layers[layer][m].end() for layer in LAYERS] for m in ("gamma", "error_large"))
        print(f"| {strategy} | {' / '.join(f'{g:.2f}' for g in gamma)} | {' / '.join(f'{e:.4f}' for e in error)} |")


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("results/cifar10_strategies"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--shard", default="0/1", help="i/n: this process takes every n-th run, from the i-th")
    parser.add_argument("--report", action="store_true", help="only report")
    options = parser.parse_args()
    index, count = map(int, options.shard.split("/"))
    runs = [(strategy, seed) for seed in range(options.seeds) for strategy in STRATEGIES]
    for strategy, seed in [] if options.report else runs[index::count]:
        result = options.output / f"{strategy}_{seed}.json"
        if not result.exists():
            measured = train(strategy, seed, options)
            result.write_text(json.dumps(measured, indent=1))
            print(strategy, seed, measured, flush=True)
    report(options.output)


if __name__ == "__main__":
    main()
