"""What a quantized training step costs: time and bytes beside the float step, measured in turns in one run.

    python benchmarks/step_cost.py [--device cpu|cuda] [--threads 2] [--steps 20] [--only vit] [--profile]
    python benchmarks/step_cost.py --integer [--device cpu|cuda] [--threads 2] [--steps 20] [--size 1024]

The first form trains each network of the list in float and in 4/4/4 (LargeGradientInterval), a step of the one after
a step of the other, and prints medians, the first step over an ordinary one, and the bytes that autograd keeps for
backward: each storage once, the network's own parameters and buffers not counted. On CUDA it adds ResNet-50 in
bf16-mixed, and counts how often a step makes the host wait for the device.
The second form times one Linear likewise: simulated, on int8 codes, in FP32 and in bf16.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_quant.models  # noqa: F401  (registers the CIFAR networks with timm)
from lightning_quant.gradient import LargeGradientInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.gradient.optimizer import QuantizerOptimizer
from lightning_quant.gradient.preparation import quantize_layers
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import Bits, plan_layers
from lightning_quant.nn.layers import Execution

BITS = Bits(4, 4, 4)
QUANTIZER_LR = 1e-5
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """A network and its batch."""

    network: str
    batch: int
    pixels: int
    channels_last: bool = False
    bf16: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{self.network}, batch {self.batch}, {layout}{', bf16-mixed' if self.bf16 else ''}"


CASES = [
    Case("cifar_resnet20", 128, 32),
    Case("cifar_resnet20", 128, 32, channels_last=True),
    Case("vit_tiny_patch16_224", 16, 224),
]
CUDA_CASES = [*CASES, Case("resnet50", 128, 224, channels_last=True, bf16=True)]


class Training:
    """A network that is trained on one batch, with quantizers as GradientQuantization sets them up, or in float."""

    def __init__(
        self,
        network: nn.Module,
        batch: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        quantized: bool,
        bf16: bool = False,
        execution: Execution = "simulated",
        first_and_last: Any = "float",
    ) -> None:
        self.network, self.batch, self.loss, self.bf16 = network, batch, loss, bf16
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        self.noise = NoiseSource(seed=0)
        self.steps = 0
        if quantized:
            chosen = plan_layers(network, BITS, first_and_last).chosen
            layers = quantize_layers(network, chosen, LargeGradientInterval(), execution)
            for layer in layers.values():
                assert isinstance(layer.gradient_quantizer, GradientQuantizer)
                layer.gradient_quantizer.run.noise = self.noise
            ours = QuantizerOptimizer(layers, self.optimizer, QUANTIZER_LR)
            self.optimizer.register_step_post_hook(lambda *_: ours.step())

    def forward(self) -> Tensor:
        """The loss."""
        images, target = self.batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(self.network(images), target)

    def step(self) -> None:
        """One optimizer step."""
        self.noise.restart(self.steps)
        self.steps += 1
        self.optimizer.zero_grad()
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def seconds(self) -> float:
        """Time of one step."""
        wait = torch.cuda.synchronize if self.batch[0].is_cuda else int
        wait()
        start = time.perf_counter()
        self.step()
        wait()
        return time.perf_counter() - start

    def kept_bytes(self) -> int:
        """Bytes of the storages that autograd keeps from forward to backward, each once, without the network's own."""
        own = {t.untyped_storage().data_ptr() for t in (*self.network.parameters(), *self.network.buffers())}
        kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.forward()
        return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)

    def synchronisations(self) -> int:
        """How often the host waits for the device in one step; CUDA only."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step()
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(each.message) for each in caught)


def alternate(trainings: dict[str, Training], steps: int) -> dict[str, tuple[float, float]]:
    """First step and median of the ordinary steps in seconds, by name; the trainings take turns."""
    first = {name: training.seconds() for name, training in trainings.items()}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(WARM_UP + steps):
        for name, training in trainings.items():
            times[name].append(training.seconds())
    return {name: (first[name], statistics.median(each[WARM_UP:])) for name, each in times.items()}


def make_case(case: Case, quantized: bool, device: torch.device) -> Training:
    """A network with random weights and a random batch, the same ones for both."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(case.network, num_classes=10).to(device)
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    if case.channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (case.batch,), device=device)
    return Training(network, (images, labels), F.cross_entropy, quantized, case.bf16)


def networks(device: torch.device, steps: int, only: str, profile: bool) -> None:
    """Print the table of the networks."""
    cuda = device.type == "cuda"
    syncs = " synchronisations float, 4/4/4 |" if cuda else ""
    print(f"| training | float ms | 4/4/4 ms | ratio | first / ordinary | kept MB float | 4/4/4 | ratio |{syncs}")
    print("|---|---|---|---|---|---|---|---|" + "---|" * cuda)
    profiles = []
    for case in CUDA_CASES if cuda else CASES:
        if only not in case.network:
            continue
        trainings = {name: make_case(case, name == "4/4/4", device) for name in ("float", "4/4/4")}
        measured = alternate(trainings, steps)
        (_, plain), (first, ours) = measured["float"], measured["4/4/4"]
        kept = [training.kept_bytes() / 1e6 for training in trainings.values()]
        counted = [str(training.synchronisations()) for training in trainings.values()] if cuda else []
        print(
            f"| {case} | {1e3 * plain:.1f} | {1e3 * ours:.1f} | {ours / plain:.2f} | {first / ours:.2f} "
            f"| {kept[0]:.1f} | {kept[1]:.1f} | {kept[1] / kept[0]:.3f} |"
            + (f" {', '.join(counted)} |" if cuda else ""),
            flush=True,
        )
        if profile:
            profiles += [f"\n{case}, {name}\n{top_operators(training)}" for name, training in trainings.items()]
    print("\n".join(profiles))


def integer(device: torch.device, steps: int, size: int) -> None:
    """Print the table of one Linear: ``size`` inputs and outputs, a batch of ``size``, forward and backward."""

    def mean_product(output: Tensor, target: Tensor) -> Tensor:
        return (output.float() * target).mean()

    def make(quantized: bool, bf16: bool = False, execution: Execution = "simulated") -> Training:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(size, size, device=device))
        x = torch.randn(size, size, device=device).requires_grad_()
        target = torch.randn(size, size, device=device)
        return Training(network, (x, target), mean_product, quantized, bf16, execution, "same")

    trainings = {
        "float32": make(quantized=False),
        "bf16-mixed": make(quantized=False, bf16=True),
        "4/4/4 simulated": make(quantized=True),
        "4/4/4 simulated, bf16-mixed": make(quantized=True, bf16=True),
        "4/4/4 integer": make(quantized=True, execution="integer"),
    }
    measured = alternate(trainings, steps)
    print(f"| Linear {size}x{size}, batch {size} | ms a step | of float32 | of bf16-mixed |\n|---|---|---|---|")
    for name, (_, median) in measured.items():
        ratios = [median / measured[reference][1] for reference in ("float32", "bf16-mixed")]
        print(f"| {name} | {1e3 * median:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def top_operators(training: Training, steps: int = 3) -> str:
    """Table of the operators that take most of the time."""
    cuda = training.batch[0].is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            training.step()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))


def machine(device: torch.device) -> str:
    """What the times were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch (default: its own choice)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each training (default: 20)")
    parser.add_argument("--only", default="", help="part of a network's name (default: all)")
    parser.add_argument("--profile", action="store_true", help="also print the operators that take most of the time")
    parser.add_argument("--integer", action="store_true", help="time one Linear instead of the networks")
    parser.add_argument("--size", type=int, default=None, help="of the Linear (default: 1024, on CUDA 4096)")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{machine(device)}\n\n    python {' '.join(sys.argv)}\n")
    if options.integer:
        integer(device, options.steps, options.size or (4096 if device.type == "cuda" else 1024))
    else:
        networks(device, options.steps, options.only, options.profile)


if __name__ == "__main__":
    main()
