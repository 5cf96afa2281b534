"""Errors of a diffusion model over its denoising steps: ranges alone, per step, and AccuQuant.

    python benchmarks/accuquant_errors.py --model FOLDER --features digits

For each bit-width and seed it makes float trajectories and calibrates from the same ranges three times: not at all,
with each step from the float state, and over windows. Network calls of the last two are the same: a window is walked,
and then walked again with gradients, so the per-step baseline has twice the updates. Every run is written to a file of
results when it is done, and one that is there is not repeated. It prints a table and draws curves and images.

FID2FP32 is between images of the quantized and of the float model from the same seeds, by the features of a small
classifier of the same data, which it trains (``digits``, ``fashion_mnist``; seconds to minutes).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_quant.accuquant.generation import generate_images
from lightning_quant.accuquant.pipelines import load_pipeline
from lightning_quant.accuquant.preparation import Parts, sampler_for, start
from lightning_quant.accuquant.settings import Settings
from lightning_quant.accuquant.trajectory_errors import single_step_errors
from lightning_quant.metrics import GenerationMetrics
from lightning_quant.nn import strip
from lightning_quant.nn.in_float import in_float
from lightning_quant.report import draw_error_curves, draw_window_sweep

METHODS = ("ranges", "reconstruction", "per_step", "accuquant")
NAMES = {"ranges": "ranges alone", "reconstruction": "block reconstruction", "per_step": "per step"}
FIRST_IMAGE = 100_000
BLOCK_ITERATIONS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a DDIM or DDPM pipeline")
    parser.add_argument("--features", default="digits", help="digits or fashion_mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST, for its features")
    parser.add_argument("--bits", nargs="+", default=["4/8", "4/6", "3/6"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows", type=int, nargs="+", default=[4], help="several make a sweep of equal calls")
    parser.add_argument("--updates", type=int, default=100, help="of the first window; per step has twice as many")
    parser.add_argument("--images", type=int, default=256, help="to compare")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--option", action="append", default=[], help="of Settings, as learn=rounding")
    parser.add_argument("--output", type=Path, default=Path("accuquant_errors"))
    parser.add_argument("--pictures", type=Path, help="folder for pictures of all results")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    updates = arguments.updates
    features = feature_network(arguments.features, arguments.data, arguments.output)
    for seed, bits, window in itertools.product(range(arguments.seeds), arguments.bits, arguments.windows):
        # The same network calls for all lengths.
        arguments.window = window
        arguments.updates = max(1, round(updates * arguments.windows[0] / window))
        for method in arguments.methods:
            key = {
                "method": method,
                "bits": bits,
                "seed": seed,
                "steps": arguments.steps,
                "option": arguments.option,
                "window": arguments.window,
                "updates": arguments.updates,
                "model": arguments.model.name,
            }
            if not any(key.items() <= run.items() for run in done):
                run = {**key, **measure(arguments, method, bits, seed, features)}
                done.append(run)
                with file.open("a") as out:
                    out.write(json.dumps(run) + "\n")
                print({k: v for k, v in run.items() if k not in ("accumulated", "single_step")}, flush=True)
    same = {"model": arguments.model.name, "steps": arguments.steps, "option": arguments.option}
    runs = [run for run in done if same.items() <= run.items()]
    calls = updates * arguments.windows[0]
    print(table([run for run in runs if run["window"] == arguments.windows[0] and run["updates"] == updates]))
    if arguments.pictures:
        draw(runs, arguments, calls)


def measure(arguments: argparse.Namespace, method: str, bits: str, seed: int, features: nn.Module) -> dict[str, Any]:
    """One calibration, and what its images are worth."""
    settings = settings_of(arguments, method, bits, seed)
    trainer = pl.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        default_root_dir=str(arguments.output),
    )
    model = load_pipeline(arguments.model)
    model.network.requires_grad_(False).eval()
    parts = Parts(model.denoiser(), model.scheduler, model.sample_shape)
    begin = time.perf_counter()
    cache = arguments.output / f"{arguments.model.name}_{arguments.steps}_{seed}"
    calibration = start(trainer, parts, settings, cache)
    while not calibration.finished:
        calibration.step()
    seconds = time.perf_counter() - begin
    # Those of the updates: the looks at held-out trajectories are the same for all.
    calls = calibration.updates * settings.window * (1 if method == "per_step" else 2)
    sampler = sampler_for(parts, settings)
    held = calibration.source.cache.trajectories(calibration.source.held_out)
    accumulated = calibration.held_out_errors()
    single = single_step_errors(parts.denoiser, sampler, held)
    metrics = GenerationMetrics(features, lpips_net=None)
    for ids in torch.arange(FIRST_IMAGE, FIRST_IMAGE + arguments.images).split(64):
        made = generate_images(model, parts, sampler, ids.tolist(), settings.seed, torch.device("cpu"))
        with in_float(model.network):
            expected = generate_images(model, parts, sampler, ids.tolist(), settings.seed, torch.device("cpu"))
        metrics.update(made, expected)
    measured = metrics.compute()
    strip(model.network)
    return {
        "end": float(accumulated[-1]),
        "FID2FP32": measured["FID2FP32"],
        "PSNR": measured["PSNR"],
        "SSIM": measured.get("SSIM"),
        "updates_done": calibration.updates,
        "calls": calls,
        "seconds": round(seconds),
        "checks": calibration.checks,
        "accumulated": accumulated.tolist(),
        "single_step": single.tolist(),
    }


def settings_of(arguments: argparse.Namespace, method: str, bits: str, seed: int) -> Settings:
    """The same for all methods but for the gradient and the number of updates."""
    weight, activation = map(int, bits.split("/"))
    updates = {"ranges": 0, "reconstruction": 0, "per_step": 2 * arguments.updates}.get(method, arguments.updates)
    options = dict(pair.split("=") for pair in arguments.option)
    kinds = {
        "trajectories": int,
        "held_out": int,
        "rounding_lr": float,
        "activation_lr": float,
        "reconstruction": int,
        "batch_size": int,
        "patience": int,
    }
    common: dict[str, Any] = {name: kinds.get(name, str)(value) for name, value in options.items()}
    common = {"trajectories": 128, "held_out": 64, "patience": 1000, **common}
    common["reconstruction"] = BLOCK_ITERATIONS if method == "reconstruction" else 0
    return Settings(
        weight,
        activation,
        steps=arguments.steps,
        window=arguments.window,
        updates=updates,
        adjoint="per_step" if method == "per_step" else common.pop("adjoint", "identity"),
        seed=seed,
        check_every=max(1, updates // 5),
        **common,
    )


def feature_network(name: str, data: Path | None, folder: Path) -> nn.Module:
    """A small classifier, whose last hidden layer is the features; trained once."""
    file = folder / f"features_{name}.pt"
    images, labels = (digits if name == "digits" else fashion)(data)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
    )
    head = nn.Linear(32, 10)
    if file.exists():
        network.load_state_dict(torch.load(file))
    else:
        optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 2e-3)
        for _ in range(max(3, 60_000 // len(images))):
            for rows in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(head(network(images[rows])), labels[rows])
                loss.backward()
                optimizer.step()
        torch.save(network.state_dict(), file)
    return nn.Sequential(_Grey(), network).eval().requires_grad_(False)


class _Grey(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


def digits(data: Path | None) -> tuple[Tensor, Tensor]:
    """The digits that ship with scikit-learn, in [0, 1]."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def fashion(data: Path | None) -> tuple[Tensor, Tensor]:
    """The first 20 000 of Fashion-MNIST, in [0, 1]."""
    from torchvision.datasets import FashionMNIST

    found = FashionMNIST(str(data))
    return found.data[:20_000, None].float() / 255, found.targets[:20_000]


def draw(runs: list[dict[str, Any]], arguments: argparse.Namespace, calls: int) -> None:
    """Errors over the steps for each bit-width, and over the length of windows where there are several."""
    name = arguments.model.name
    for bits in arguments.bits:
        some = [run for run in runs if run["bits"] == bits and run["window"] == arguments.windows[0]]
        curves: dict[str, dict[str, Any]] = {"accumulated": {}, "single_step": {}}
        for run, kind in itertools.product(some, curves):
            curves[kind].setdefault(NAMES.get(run["method"], "AccuQuant"), []).append(run[kind])
        stacked = [{key: torch.tensor(rows) for key, rows in found.items()} for found in curves.values()]
        path = arguments.pictures / f"accuquant_errors_{name}_{bits.replace('/', '_')}.png"
        draw_error_curves(stacked[0], stacked[1], path=path)
        swept = {}
        for run in runs:
            if (run["bits"], run["method"]) == (bits, "accuquant") and run["window"] * run["updates"] == calls:
                swept.setdefault(run["window"], []).append(run["end"])
        if len(swept) > 1:
            before = [run["end"] for run in some if run["method"] == "ranges"]
            path = arguments.pictures / f"accuquant_windows_{name}_{bits.replace('/', '_')}.png"
            level = statistics.mean(before) if before else None
            draw_window_sweep(dict(sorted(swept.items())), path=path, calls=2 * calls, before=level)


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds, and each."""
    lines = [
        "| bits | method | end error | each | FID2FP32 | each | PSNR | calls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for bits in dict.fromkeys(run["bits"] for run in runs):
        for method in dict.fromkeys(run["method"] for run in runs):
            some = [run for run in runs if (run["bits"], run["method"]) == (bits, method)]
            if some:
                cells = [bits, NAMES.get(method, "AccuQuant")]
                for key, form in (("end", ".4f"), ("FID2FP32", ".3f")):
                    values = [run[key] for run in some]
                    cells += [f"{statistics.mean(values):{form}}", ", ".join(f"{v:{form}}" for v in values)]
                cells += [f"{statistics.mean(run['PSNR'] for run in some):.1f}", str(some[0]["calls"])]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
