"""INT4 training of a small ResNet on the digits, with three strategies for the gradients' interval."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from lightning_quant.data import DigitsDataModule
from lightning_quant.demo.runs import TEST_IMAGES, Outcome, cpu_trainer
from lightning_quant.demo.terminal import RunBar
from lightning_quant.gradient import (
    GradientQuantization,
    IntervalStrategy,
    LargeGradientInterval,
    MinimumErrorInterval,
    MinMaxInterval,
)
from lightning_quant.report import (
    LayerMetrics,
    QuantizationReport,
    draw_intervals,
    read_layer_metrics,
    with_float,
)
from lightning_quant.tasks import ImageClassifier

METHOD = "int4_training"
NETWORK = "cifar_resnet20"
EPOCHS = 10
SEEDS = 2
BATCH_SIZE = 64
LOG_EVERY = 5

# With 220 steps in a run, searching every 20 steps is often enough for the minimum of the error.
STRATEGIES: dict[str, IntervalStrategy | None] = {
    "float": None,
    "large_gradient": LargeGradientInterval(),
    "min_max": MinMaxInterval(),
    "minimum_error": MinimumErrorInterval(every=20),
}
TITLES = {
    "float": "float",
    "large_gradient": "4/4/4 large gradient",
    "min_max": "4/4/4 min-max",
    "minimum_error": "4/4/4 minimum error",
}


@dataclass(frozen=True)
class Run:
    """Result of one training.

    Attributes:
        accuracy: Test accuracy in [0, 1].
        seconds: Duration of the training in seconds.
        checkpoint: Path of the checkpoint.
        metrics: Logged metrics of the layers; None in float.
    """

    accuracy: float
    seconds: float
    checkpoint: Path
    metrics: LayerMetrics | None


def run(console: Console, output: Path, seed: int) -> Outcome:
    """Train a small ResNet in float and in 4 bits, and compare the interval strategies.

    Args:
        console: Console to print to.
        output: Folder for ``intervals.png``, and for the checkpoint and log of each training.
        seed: Seed of the first training of each strategy; further trainings use the following seeds.

    Returns:
        Mean accuracy of each strategy, in [0, 1], and the report of one run with the large-gradient interval.
    """
    start = time.perf_counter()
    _introduce(console)
    seeds = range(seed, seed + SEEDS)
    shown = QuantizationReport(str(output / METHOD))
    runs = {
        name: [_train(name, output, s, [shown] if (name, s) == ("large_gradient", seed) else []) for s in seeds]
        for name in STRATEGIES
    }
    first_runs = {TITLES[name]: trainings[0].metrics for name, trainings in runs.items()}
    draw_intervals(
        {title: metrics for title, metrics in first_runs.items() if metrics is not None},
        output / "intervals.png",
        title=f"Digits, {NETWORK}, 4/4/4, seed {seed}",
    )
    _conclude(console, runs, output, time.perf_counter() - start)
    assert shown.report is not None
    means = {name: statistics.mean(run.accuracy for run in trainings) for name, trainings in runs.items()}
    return Outcome(means, with_float(shown.report, {"test/acc": runs["float"][0].accuracy}))


def _train(strategy: str, output: Path, seed: int, others: Sequence[pl.Callback]) -> Run:
    """Train, save the checkpoint and test."""
    pl.seed_everything(seed, verbose=False)
    interval = STRATEGIES[strategy]
    folder = output / METHOD / f"{strategy}_{seed}"
    (folder / "metrics.csv").unlink(missing_ok=True)
    bar: list[pl.Callback] = [RunBar(f"{TITLES[strategy]}, seed {seed}")]
    trainer = cpu_trainer(
        max_epochs=EPOCHS,
        callbacks=bar if interval is None else [*bar, GradientQuantization(4, 4, 4, interval), *others],
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        log_every_n_steps=LOG_EVERY,
    )
    model, data = _model(), DigitsDataModule(BATCH_SIZE, validation_fraction=0.0)
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    checkpoint = folder / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    accuracy = trainer.test(model, data, verbose=False)[0]["test/acc"]
    metrics = None if interval is None else read_layer_metrics(folder / "metrics.csv")
    return Run(accuracy, seconds, checkpoint, metrics)


def _model() -> ImageClassifier:
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
    return ImageClassifier(
        NETWORK, 10, model_kwargs={"in_chans": 1}, optimizer=sgd, lr_scheduler="one_cycle", channels_last=True
    )


def _introduce(console: Console) -> None:
    console.print(
        f"[bold]INT4 training[/bold]: {NETWORK} on the digits of scikit-learn (1 437 training and {TEST_IMAGES} test "
        f"images), {EPOCHS} epochs on the CPU, {SEEDS} seeds: in float, and with weights, activations and gradients "
        "in 4 bits with three strategies for the gradients' interval.\n",
        highlight=False,
    )
    console.print(str(GradientQuantization(4, 4, 4).plan(_model())), highlight=False, markup=False)
    console.print(
        "Products are simulated in floating point: the results of 4-bit units, but not their speed.\n",
        highlight=False,
    )


def _conclude(console: Console, runs: Mapping[str, list[Run]], output: Path, seconds: float) -> None:
    table = Table(title=f"Digits, {NETWORK}, mean of {SEEDS} seeds, {seconds:.0f} s in all", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for heading in ("test accuracy", "final E(G_large)", "final gamma", "s per training"):
        table.add_column(heading, justify="right")
    for name, trainings in runs.items():
        table.add_row(
            TITLES[name],
            f"{statistics.mean(run.accuracy for run in trainings):.2%}",
            _mean_end(trainings, "error_large", ".4f"),
            _mean_end(trainings, "gamma", ".3f"),
            f"{statistics.mean(run.seconds for run in trainings):.1f}",
        )
    console.print()
    console.print(table)
    checkpoint = runs["large_gradient"][0].checkpoint
    console.print(
        f"""\
E(G_large): mean error of the largest 0.1 % of a layer's gradients, relative to
the largest one. gamma: end of the interval, relative to the largest gradient.
Both are means over the layers and the last five logs. One test image is {1 / TEST_IMAGES:.2%}:
on data so small and easy, differences of up to one point are not significant.

Picture    {output / "intervals.png"}
Trainings  {output / METHOD} (log and checkpoint of each)

Try next
  lightning-quant fit --config quickstart.yaml --quantization.gradient_bits 3
  lightning-quant fit --config quickstart.yaml --quantization.interval MinMaxInterval
or, in Python, load a network that was just trained:
  from lightning_quant import ImageClassifier, load_from_checkpoint
  model = load_from_checkpoint(ImageClassifier, "{checkpoint}").eval()""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _mean_end(runs: list[Run], measure: str, spec: str) -> str:
    ends = [run.metrics.mean_end(measure) for run in runs if run.metrics is not None]
    return format(statistics.mean(ends), spec) if ends else "-"
