"""AccuQuant on the digits: a small diffusion model, calibrated step by step and over windows of steps."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDIMPipeline
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_quant.accuquant.module import AccuQuantModule
from lightning_quant.accuquant.windows import network_calls
from lightning_quant.data import DigitsDataModule
from lightning_quant.demo.runs import Outcome, cpu_trainer
from lightning_quant.demo.terminal import RunBar
from lightning_quant.export import load_quantized_pipeline, save_quantized_pipeline
from lightning_quant.metrics import GenerationMetrics
from lightning_quant.report import QuantizationReport, draw_generation
from lightning_quant.tasks import ImageDiffusion

METHOD = "accuquant"
NETWORK: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
# With so few pixels the usual 0.02 destroys the image too early.
SCHEDULER = {"beta_end": 0.012}
EPOCHS = 50
BATCH_SIZE = 64
FEATURE_EPOCHS = 30

BITS = (4, 8)
STEPS = 20
WINDOW = 2
UPDATES = 150
TRAJECTORIES = 128
# Higher than the defaults, because there are few updates.
RATES = {"rounding_lr": 1e-2, "activation_lr": 1e-3}
IMAGES = 256
TITLES = {
    "float": "float",
    "ranges": "ranges alone",
    "per_step": "per step",
    "accuquant": "AccuQuant",
}
# Metrics of equal images; see GenerationMetrics.
FLOAT = {"end_error": 0.0, "FID2FP32": 0.0, "PSNR": 100.0}


@dataclass(frozen=True)
class Run:
    """Result of one calibration and test.

    Attributes:
        measures: Metrics ``end_error``, ``FID2FP32`` and ``PSNR``, see :func:`run`.
        seconds: Duration of the calibration in seconds.
        module: Quantized module with the report of its test.
    """

    measures: Mapping[str, float]
    seconds: float
    module: AccuQuantModule


def run(console: Console, output: Path, seed: int) -> Outcome:
    """Train a small UNet in float, and compare how far its images move under each calibration.

    Args:
        console: Console to print to.
        output: Folder for ``images.png``, ``error_curves.png``, the float pipeline and the quantized one.
        seed: Seed of the training, the noise and the batches.

    Returns:
        Distances of ``float``, ``per_step`` and ``accuquant`` to the float model, and the report of the run over
        windows. The distances are ``end_error``, the RMSE of the last states from held-out noise, with images in
        [-1, 1]; ``FID2FP32``; and ``PSNR`` in dB, 100 for equal images.
    """
    start = time.perf_counter()
    _introduce(console)
    pipeline = output / METHOD / "float"
    _train(pipeline, seed)
    features = _features(seed)
    with tempfile.TemporaryDirectory() as cache:
        report = QuantizationReport(str(output / METHOD))
        runs = {
            name: _calibrate(name, pipeline, features, cache, seed, [report] if name == "accuquant" else [])
            for name in _quantizations()
        }
    _conclude(console, runs, time.perf_counter() - start)
    pictures = draw_generation(_drawn(runs), output)
    _show_one(console, runs["accuquant"].module, output, pictures)
    assert report.report is not None
    measures = {name: dict(runs[name].measures) for name in ("per_step", "accuquant")}
    return Outcome({"float": FLOAT, **measures}, report.report)


def _train(pipeline: Path, seed: int) -> None:
    """Train in float, and save the averaged weights as a diffusers pipeline."""
    pl.seed_everything(seed, verbose=False)
    adamw = partial(torch.optim.AdamW, lr=4e-3, weight_decay=1e-4)
    model = ImageDiffusion(NETWORK, SCHEDULER, pipeline=str(pipeline), optimizer=adamw, lr_scheduler="one_cycle")
    callbacks = [RunBar(f"UNet in float, seed {seed}"), EMAWeightAveraging(decay=0.99)]
    trainer = cpu_trainer(max_epochs=EPOCHS, callbacks=callbacks, logger=False, gradient_clip_val=1.0)
    trainer.fit(model, _digits(mean=(0.5,), std=(0.5,)))


def _features(seed: int) -> nn.Module:
    """Train a small digit classifier in seconds, and return it up to its last hidden layer."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 4 * 4, 32), nn.ReLU()),
    )
    head = nn.Linear(32, 10)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 2e-3)
    data = _digits(mean=(0.0,), std=(1.0,))
    data.setup("fit")
    for _ in range(FEATURE_EPOCHS):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(network(images)), labels).backward()
            optimizer.step()
    return nn.Sequential(_Grey(), network)


class _Grey(nn.Module):
    """Conversion of the three equal channels that feature networks get back to one."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1]


def _digits(mean: tuple[float], std: tuple[float]) -> DigitsDataModule:
    return DigitsDataModule(BATCH_SIZE, validation_fraction=0.0, mean=mean, std=std)


def _quantizations() -> dict[str, dict[str, Any]]:
    """Return the settings of each run; both learning runs make equally many network calls.

    A window needs more calls per update, because it is walked to its last step before any gradient is known.
    """
    calls = UPDATES * network_calls("identity", WINDOW)
    return {
        "ranges": {"updates": 0},
        "per_step": {"updates": calls // network_calls("per_step", WINDOW), "adjoint": "per_step"},
        "accuquant": {"updates": UPDATES},
    }


def _calibrate(
    name: str, pipeline: Path, features: nn.Module, cache: str, seed: int, others: Sequence[pl.Callback]
) -> Run:
    """Calibrate and test as a user would, with the module, ``trainer.fit`` and ``trainer.test``."""
    settings = _quantizations()[name]
    module = AccuQuantModule(
        str(pipeline),
        images=IMAGES,
        image_batch_size=64,
        metrics=GenerationMetrics(features, lpips_net=None),
        quantization={
            "weight_bits": BITS[0],
            "activation_bits": BITS[1],
            "steps": STEPS,
            "window": WINDOW,
            "trajectories": TRAJECTORIES,
            **RATES,
            "seed": seed,
            "cache_dir": cache,
            # No early stopping, so that network calls are equal.
            "check_every": max(1, settings["updates"] // 8),
            "patience": settings["updates"] + 1,
            **settings,
        },
    )
    trainer = cpu_trainer(max_epochs=1, callbacks=[RunBar(f"{TITLES[name]}, seed {seed}"), *others], logger=False)
    start = time.perf_counter()
    with _as_expected():
        trainer.fit(module)
        seconds = time.perf_counter() - start
        metrics = trainer.test(module, verbose=False)[0]
    measures = {"end_error": metrics["test/error_end"], **{key: metrics[f"test/{key}"] for key in ("FID2FP32", "PSNR")}}
    return Run(measures, seconds, module)


@contextmanager
def _as_expected() -> Iterator[None]:
    """Suppress warnings about intended settings: missing metrics, an iterable data set of steps, few workers."""
    with warnings.catch_warnings():
        for message in ("Not computed: ", ".*IterableDataset.*", ".*does not have many workers.*"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _drawn(runs: Mapping[str, Run]) -> Any:
    """Merge the reports of all tests into one."""
    reports = {TITLES[name]: run.module.generation_report for name, run in runs.items()}
    first = next(iter(reports.values()))
    quantized = {title: report["images"]["quantized"] for title, report in reports.items()}
    return {
        "images": {"float": first["images"]["float"], **quantized},
        "timesteps": first["timesteps"],
        **{
            kind: {title: report[kind]["quantized"] for title, report in reports.items()}
            for kind in ("accumulated", "single_step")
        },
    }


def _introduce(console: Console) -> None:
    console.print(
        f"[bold]AccuQuant[/bold]: a small diffusion model is trained on the same digits, {EPOCHS} epochs in float, and "
        f"samples images in {STEPS} steps. Then its weights are quantized to {BITS[0]} bits and its activations to "
        f"{BITS[1]}. All three runs start from the same ranges; the rounding of weights and the step sizes are then "
        f"either not learned, learned for each step from the float state, or learned over windows of {WINDOW} steps of "
        "the quantized model.\n",
        highlight=False,
    )


def _conclude(console: Console, runs: Mapping[str, Run], seconds: float) -> None:
    title = f"Digits, UNet of 8x8 pixels, weights/activations {BITS[0]}/{BITS[1]}, {seconds:.0f} s in all"
    table = Table(title=title, title_justify="left")
    table.add_column("distance to the float model", no_wrap=True)
    for heading in ("end error", "FID2FP32", "PSNR", "calls", "s"):
        table.add_column(heading, justify="right")
    table.add_row(TITLES["float"], "0", "0", "equal", "-", "-")
    for name, run in runs.items():
        measures = run.measures
        table.add_row(
            TITLES[name],
            f"{measures['end_error']:.4f}",
            f"{measures['FID2FP32']:.3f}",
            f"{measures['PSNR']:.1f} dB",
            str(_calls(run)),
            f"{run.seconds:.0f}",
        )
    console.print()
    console.print(table)
    console.print(
        f"""\
All distances are to the images of the float model from the same seeds, so float
itself is 0. end error: RMSE after the last of {STEPS} steps from held-out noise, with
images in [-1, 1]. FID2FP32: on the features of a small digit classifier, {IMAGES}
images. calls: network calls of the updates, the same for both methods. s: seconds
of the whole calibration. ranges alone: nothing is learned. per step: each step
starts at the float state, as in earlier methods. One network and one seed: run
other seeds before you rank the methods.""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _calls(run: Run) -> int:
    """Return the number of network calls of the updates."""
    settings, calibration = run.module.quantization.settings, run.module.calibration
    assert calibration is not None
    return calibration.updates * network_calls(settings.adjoint, WINDOW)


def _show_one(console: Console, module: AccuQuantModule, output: Path, pictures: Sequence[Path]) -> None:
    """Save the quantized pipeline, load it again, and print the paths of all results."""
    folder = save_quantized_pipeline(module.model, output / METHOD / "quantized", module.network)
    images = [
        pipeline(batch_size=4, generator=torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np")
        for pipeline in (load_quantized_pipeline(folder), _around(module))
    ]
    same = bool((images[0].images == images[1].images).all())
    verdict = "the same images, bit for bit" if same else "OTHER images, a bug: please report it"
    console.print(
        f"""
Pictures   {", ".join(map(str, pictures))}
Quantized  {folder}, a diffusers pipeline; loaded again it gives
           {verdict}
Float      {output / METHOD / "float"}

Try next
  lightning-quant fit --config diffusion/digits.yaml
  lightning-quant calibrate --config accuquant/quickstart.yaml
  lightning-quant test --config accuquant/quickstart.yaml --ckpt_path digits_ddim_4bit/last.ckpt
or, in Python, load the quantized pipeline:
  from lightning_quant import load_quantized_pipeline
  images = load_quantized_pipeline("{folder}")(batch_size=16, num_inference_steps={STEPS}).images""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _around(module: AccuQuantModule) -> Any:
    """Return a diffusers pipeline around the quantized network in memory."""
    pipeline: Any = DDIMPipeline(module.network, module.model.scheduler)
    return pipeline
