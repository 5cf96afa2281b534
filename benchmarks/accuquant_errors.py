"""Errors of a diffusion model over its denoising steps: ranges alone, per step, and AccuQuant.

    python benchmarks/accuquant_errors.py --model FOLDER --features digits

For each bit-width and seed it makes float trajectories, finds ranges, reconstructs the blocks, and goes on from there
with each step from the float state, and over windows. Network calls of the updates are the same for these two: a window
of M steps takes 2 M - 1 calls, because it is walked to its last step first, and M when each step begins at the float
state, so that per step has nearly twice the updates. With ``--reconstruction 0`` both go on from the ranges. Errors are
of trajectories that no calibration saw. Every run is written to a file of results when it is done, and one that is
there is not repeated. It prints a table and draws curves.

FID2FP32 is between images of the quantized and of the float model from the same seeds, by the features of a small
classifier of the same data, which it trains (``digits``, ``fashion_mnist``; seconds to minutes).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_quant.accuquant.calibration import Calibration
from lightning_quant.accuquant.pipelines import load_float_pipeline
from lightning_quant.accuquant.preparation import Parts, sampler_for, start, trajectories
from lightning_quant.accuquant.settings import Settings
from lightning_quant.accuquant.source import single_step_errors
from lightning_quant.accuquant.windows import network_calls, roll
from lightning_quant.metrics import GenerationMetrics
from lightning_quant.nn import strip
from lightning_quant.report import draw_error_curves, draw_window_sweep

METHODS = ("ranges", "reconstruction", "per_step", "accuquant")
NAMES = {"ranges": "ranges alone", "reconstruction": "block reconstruction", "per_step": "per step"}
FIRST_IMAGE = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a DDIM or DDPM pipeline")
    parser.add_argument("--features", default="digits", help="digits or fashion_mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST, for its features")
    parser.add_argument("--bits", nargs="+", default=["4/8", "4/6", "3/6"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows", type=int, nargs="+", default=[4], help="lengths; several make a sweep")
    parser.add_argument("--calls", type=int, default=1400, help="of the network, in the updates of a calibration")
    parser.add_argument("--reconstruction", type=int, default=200, help="iterations a block, before the updates")
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
    features = feature_network(arguments.features, arguments.data, arguments.output)
    chosen = (range(arguments.seeds), arguments.bits, arguments.windows, arguments.methods)
    for seed, bits, window, method in itertools.product(*chosen):
        # Neither has windows.
        if method in ("ranges", "reconstruction") and window != arguments.windows[0]:
            continue
        key = {
            "model": arguments.model.name,
            "steps": arguments.steps,
            "bits": bits,
            "seed": seed,
            "method": method,
            "window": window,
            "calls": arguments.calls,
            "reconstruction": arguments.reconstruction,
            "option": arguments.option,
        }
        if not any(key.items() <= run.items() for run in done):
            run = {**key, **measure(arguments, method, bits, window, seed, features)}
            done.append(run)
            with file.open("a") as out:
                out.write(json.dumps(run) + "\n")
            print({k: v for k, v in run.items() if k not in ("accumulated", "single_step")}, flush=True)
    same = {name: getattr(arguments, name) for name in ("steps", "calls", "reconstruction", "option")}
    same["model"] = arguments.model.name
    runs = [run for run in done if same.items() <= run.items() and run["seed"] < arguments.seeds]
    print(table([run for run in runs if run["window"] == arguments.windows[0]]))
    if arguments.pictures:
        draw(runs, arguments)


def measure(
    arguments: argparse.Namespace, method: str, bits: str, window: int, seed: int, features: nn.Module
) -> dict[str, Any]:
    """One calibration, and what its images are worth."""
    settings = settings_of(arguments, method, bits, window, seed)
    trainer = pl.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        default_root_dir=str(arguments.output),
    )
    model = load_float_pipeline(arguments.model)
    model.network.requires_grad_(False).eval()
    parts = Parts(model.denoiser(), model.scheduler, model.sample_shape)
    sampler, denoiser = sampler_for(parts, settings), parts.denoiser
    folder = arguments.output / f"{arguments.model.name}_{arguments.steps}_{seed}"
    compared = range(FIRST_IMAGE, FIRST_IMAGE + arguments.images)
    test = trajectories(trainer, parts, sampler, settings, folder / "test", compared)
    calibration = start(trainer, parts, settings, folder)
    if settings.reconstruction:
        before_updates(calibration, folder / f"stage_a_{bits.replace('/', '_')}_{settings.reconstruction}.pt")
    begin = time.perf_counter()
    while not calibration.finished:
        calibration.step()
    seconds = time.perf_counter() - begin
    metrics, squares = GenerationMetrics(features, lpips_net=None), torch.zeros(arguments.steps + 1)
    for ids in torch.tensor(compared).split(64):
        some = test.trajectories(ids)
        states = roll(lambda x, t: denoiser(x, t, {}), sampler, some.to_window()).states
        squares += (torch.stack(states) - some.states).square().sum((1, 2, 3, 4))
        metrics.update(*(model.images(x).clamp(0, 1) for x in (states[-1], some.states[-1])))
    accumulated = (squares / (len(compared) * math.prod(parts.shape))).sqrt()
    single = single_step_errors(denoiser, sampler, test.trajectories(compared[:64]))
    measured = metrics.compute()
    strip(model.network)
    return {
        "end": float(accumulated[-1]),
        **{name: float(measured[name]) for name in ("FID2FP32", "PSNR")},
        "updates": calibration.updates,
        "seconds": round(seconds),
        "checks": calibration.checks,
        "accumulated": accumulated.tolist(),
        "single_step": single.tolist(),
    }


def before_updates(calibration: Calibration, file: Path) -> None:
    """Ranges and blocks, found once for all that go on from them: how is of no account to these."""
    fingerprint = f"fingerprint/{calibration.fingerprint()}"
    if not file.exists():
        while len(calibration.blocks_done) < len(calibration.blocks):
            calibration.step()
        state = calibration.state_dict()
        del state[fingerprint]
        torch.save(state, file)
    state = torch.load(file)
    state["progress"] = torch.tensor([len(calibration.blocks), 0, not calibration.source.settings.updates])
    calibration.load_state_dict({fingerprint: torch.tensor(True), **state})


def settings_of(arguments: argparse.Namespace, method: str, bits: str, window: int, seed: int) -> Settings:
    """The same for all methods but for the gradient and the number of updates."""
    weight, activation = map(int, bits.split("/"))
    given: dict[str, Any] = {"trajectories": 128, "batch_size": 4, "rounding_lr": 1e-2, "activation_lr": 1e-3}
    given.update(option(pair) for pair in arguments.option)
    adjoint = given.pop("adjoint", "identity")
    if method == "per_step":
        adjoint = "per_step"
    learns = method in ("per_step", "accuquant")
    updates = round(arguments.calls / network_calls(adjoint, window)) if learns else 0
    return Settings(
        weight,
        activation,
        steps=arguments.steps,
        window=window,
        updates=updates,
        adjoint=adjoint,
        seed=seed,
        reconstruction=0 if method == "ranges" else arguments.reconstruction,
        check_every=max(1, -(-updates // 5)),
        # All updates are done, so that calls are equal.
        patience=updates + 1,
        **given,
    )


def option(pair: str) -> tuple[str, Any]:
    """NAME=VALUE, a number where it is one."""
    name, _, value = pair.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


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


def draw(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Errors over the steps for each bit-width, and over the length of windows where there are several."""
    for bits in arguments.bits:
        name = f"{arguments.model.name}_{bits.replace('/', '_')}.png"
        of_bits = [run for run in runs if run["bits"] == bits]
        some = [run for run in of_bits if run["window"] == arguments.windows[0]]
        curves: dict[str, dict[str, Any]] = {"accumulated": {}, "single_step": {}}
        for run, kind in itertools.product(some, curves):
            curves[kind].setdefault(NAMES.get(run["method"], "AccuQuant"), []).append(run[kind])
        stacked = [{key: torch.tensor(rows) for key, rows in found.items()} for found in curves.values()]
        draw_error_curves(stacked[0], stacked[1], path=arguments.pictures / f"accuquant_errors_{name}")
        swept: dict[int, list[float]] = {}
        for run in of_bits:
            if run["method"] == "accuquant":
                swept.setdefault(run["window"], []).append(run["end"])
        if len(swept) > 1:
            before = [run["end"] for run in some if run["method"] == "reconstruction"]
            path = arguments.pictures / f"accuquant_windows_{name}"
            level = statistics.mean(before) if before else None
            draw_window_sweep(dict(sorted(swept.items())), path=path, calls=arguments.calls, before=level)


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds, and each."""
    lines = [
        "| bits | method | end error | each | FID2FP32 | each | PSNR | each | updates | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bits, method in itertools.product(*(dict.fromkeys(run[key] for run in runs) for key in ("bits", "method"))):
        some = [run for run in runs if (run["bits"], run["method"]) == (bits, method)]
        if some:
            cells = [bits, NAMES.get(method, "AccuQuant")]
            for key, form in (("end", ".3f"), ("FID2FP32", ".2f"), ("PSNR", ".1f")):
                values = [run[key] for run in some]
                cells += [f"{statistics.mean(values):{form}}", ", ".join(f"{v:{form}}" for v in values)]
            cells += [str(some[0]["updates"]), f"{statistics.median(run['seconds'] for run in some):.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
