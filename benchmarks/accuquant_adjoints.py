"""What the adjoints of AccuQuant cost, and how near their gradients are to full back-propagation.

    python benchmarks/accuquant_adjoints.py --model FOLDER [--pictures docs]

On a pipeline with DDIM at 20 steps, quantized to 4/8 with first ranges: the most bytes that graphs hold at any one
time, over the length of the window (counted); the cosine of each gradient, of rounding and ranges together, to that of
full back-propagation, over length and position; and the time of an update in forwards of the quantized network (median,
alternating).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from adjoint_plots import draw_gradient_cosines, draw_memory
from saved_bytes import peak_saved_bytes
from torch import Tensor

from lightning_quant.accuquant.calibration import Calibration
from lightning_quant.accuquant.learning import Learner
from lightning_quant.accuquant.pipelines import load_float_pipeline
from lightning_quant.accuquant.preparation import Parts, start
from lightning_quant.accuquant.settings import Settings
from lightning_quant.accuquant.windows import Adjoint, Window, window_loss

STEPS, IMAGES = 20, 8
LENGTHS = (1, 2, 5, 10, 20)
ADJOINTS: tuple[Adjoint, ...] = ("identity", "coefficient", "exact", "per_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pipeline")
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as folder:
        bench = Bench(ranged(arguments.model, folder))
        peaks = memory(bench)
        cosines = gradients(bench)
        print(memory_table(peaks), cosine_table(cosines), times(bench), sep="\n\n")
    if arguments.pictures:
        draw_memory(peaks, arguments.pictures / "accuquant_memory.png")
        draw_gradient_cosines(cosines, arguments.pictures / "accuquant_gradients.png")


def ranged(model: Path, folder: str) -> Calibration:
    """A calibration after its first step."""
    loaded = load_float_pipeline(model)
    loaded.network.requires_grad_(False).eval()
    parts = Parts(loaded.denoiser(), loaded.scheduler, loaded.sample_shape)
    settings = Settings(4, 8, steps=STEPS, trajectories=IMAGES, held_out=1)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    calibration = start(trainer, parts, settings, folder)
    calibration.step()
    return calibration


class Bench:
    """Windows of one batch, and the gradients over them."""

    def __init__(self, calibration: Calibration) -> None:
        self.source = calibration.source
        self.learner = Learner(self.source.network, self.source.settings)

    def denoise(self, x: Tensor, t: int) -> Tensor:
        return self.source.denoiser(x, t, {})

    def window(self, steps: range) -> Window:
        return self.source.window(list(range(IMAGES)), steps).to_window()

    def run(self, adjoint: Adjoint, window: Window) -> Tensor:
        """The gradient of all that is learned, as one vector."""
        window_loss(self.denoise, self.source.sampler, window, adjoint)
        self.learner.release()
        parts = [leaf.grad for leaf in self.learner.learned if leaf.grad is not None]
        found = torch.cat([part.flatten() for part in parts])
        self.learner.optimizer.zero_grad()
        return found


def memory(bench: Bench) -> dict[str, dict[int, int]]:
    """Peak bytes by adjoint and length."""
    kept = [*bench.source.network.parameters(), *bench.learner.leaves.values()]
    kinds: Sequence[Adjoint] = ("identity", "exact", "bptt")
    return {
        adjoint: {
            length: peak_saved_bytes(bound(bench, adjoint, bench.window(range(length))), without=kept)
            for length in LENGTHS
        }
        for adjoint in kinds
    }


def bound(bench: Bench, adjoint: Adjoint, window: Window) -> Callable[[], object]:
    """A call that computes one gradient."""
    return lambda: bench.run(adjoint, window)


def gradients(bench: Bench) -> dict[str, dict[int, list[float]]]:
    """Cosine to full back-propagation by adjoint and length, at the start, the middle and the end of the trajectory."""
    found: dict[str, dict[int, list[float]]] = {adjoint: {} for adjoint in ADJOINTS}
    for length in LENGTHS:
        for first in sorted({0, (STEPS - length) // 2, STEPS - length}):
            window = bench.window(range(first, first + length))
            expected = bench.run("bptt", window)
            for adjoint in ADJOINTS:
                cosine = torch.nn.functional.cosine_similarity(bench.run(adjoint, window), expected, dim=0)
                found[adjoint].setdefault(length, []).append(float(cosine))
    return found


def times(bench: Bench, length: int = 5, repeats: int = 7) -> str:
    """Time of an update in forwards of the quantized network."""
    window = bench.window(range(length))
    x, t = window.states[0], bench.source.sampler.timesteps[0]
    taken: dict[str, list[float]] = {}
    for _ in range(repeats):
        begin = time.perf_counter()
        with torch.no_grad():
            for _ in range(length):
                bench.denoise(x, t)
        taken.setdefault("forward", []).append((time.perf_counter() - begin) / length)
        for adjoint in (*ADJOINTS, "bptt"):
            begin = time.perf_counter()
            loss = window_loss(bench.denoise, bench.source.sampler, window, adjoint)  # type: ignore[arg-type]
            bench.learner.step(loss, 0.0)
            taken.setdefault(adjoint, []).append(time.perf_counter() - begin)
    forward = statistics.median(taken.pop("forward"))
    lines = [f"| update over {length} steps | forwards | forwards a step |", "|---|---|---|"]
    for adjoint, seconds in taken.items():
        ratio = statistics.median(seconds) / forward
        lines.append(f"| {adjoint} | {ratio:.1f} | {ratio / length:.2f} |")
    return "\n".join(lines)


def memory_table(peaks: dict[str, dict[int, int]]) -> str:
    """MB over the length."""
    head = "| MB at M = | " + " | ".join(map(str, LENGTHS)) + " |"
    rows = [f"| {name} | " + " | ".join(f"{v / 1e6:.2f}" for v in row.values()) + " |" for name, row in peaks.items()]
    return "\n".join([head, "|---" * (len(LENGTHS) + 1) + "|", *rows])


def cosine_table(cosines: dict[str, dict[int, list[float]]]) -> str:
    """Start, middle and end of the trajectory in each cell."""
    head = "| cosine at M = | " + " | ".join(map(str, LENGTHS)) + " |"
    rows = [
        f"| {name} | " + " | ".join(", ".join(f"{v:.2f}" for v in values) for values in row.values()) + " |"
        for name, row in cosines.items()
    ]
    return "\n".join([head, "|---" * (len(LENGTHS) + 1) + "|", *rows])


if __name__ == "__main__":
    main()
