"""Block reconstruction, stage A of a calibration: rounding of weights, learned to reproduce a block's float output.

Sources: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568); Li et al.,
"BRECQ" (arXiv 2102.05426).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.blocks import BlockData, Call, blocks_of, gather
from lightning_quant.accuquant.plan import DenoiserPlan
from lightning_quant.accuquant.ranges import activation_quantizers
from lightning_quant.accuquant.settings import Settings
from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.rounding import rounding_penalty
from lightning_quant.nn.layers import QuantizedLayer
from lightning_quant.nn.modes import evaluating
from lightning_quant.nn.structure import quantized_layers
from lightning_quant.quantizers.rounded import RoundedQuantizer
from lightning_quant.quantizers.timestep import TimestepQuantizer
from lightning_quant.utilities.distributed import all_reduce_sum, rank_and_ranks, several_ranks

# BRECQ's weight of the penalty, its first and last exponent, and the share of iterations without it.
PENALTY, FIRST_BETA, LAST_BETA, WARM_UP = 0.01, 20.0, 2.0, 0.2
BATCH = 32
# BRECQ's learning rates for its 20 000 iterations; with fewer they grow in proportion, up to a limit.
RATE, ACTIVATION_RATE, ITERATIONS = 1e-3, 4e-5, 20_000
LARGEST_RATE, LARGEST_ACTIVATION_RATE = 0.1, 1e-3


@dataclass(frozen=True)
class Schedule:
    """Schedule of the learning of a block.

    Attributes:
        iterations: Number of updates of each block.
        rate: Learning rate of the rounding variables; None takes 1e-3, or more below 20 000 iterations.
        activation_rate: Learning rate of the logarithms of activations' step sizes, and of zero points as shares of
            the range; None takes 4e-5, or more below 20 000 iterations.
        batch: Number of images in an update.
        seed: Seed of the batches.
    """

    iterations: int
    rate: float | None = None
    activation_rate: float | None = None
    batch: int = BATCH
    seed: int = 0

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the rounding variables and of the activations."""
        factor = max(1.0, ITERATIONS / max(1, self.iterations))
        rounding = min(RATE * factor, LARGEST_RATE) if self.rate is None else self.rate
        activations = min(ACTIVATION_RATE * factor, LARGEST_ACTIVATION_RATE)
        return rounding, activations if self.activation_rate is None else self.activation_rate

    def beta(self, iteration: int) -> float | None:
        """Return the exponent of the penalty at an iteration; None before the penalty starts.

        Example:
            >>> [Schedule(10).beta(i) for i in (0, 1, 2, 6, 9)]
            [None, None, 20.0, 11.0, 4.25]
        """
        start = WARM_UP * self.iterations
        if iteration < start:
            return None
        return LAST_BETA + (FIRST_BETA - LAST_BETA) * (self.iterations - iteration) / (self.iterations - start)


class Reconstruction:
    """Block-by-block reconstruction of a denoiser, whose results are stored in the quantizers.

    After any block the state of the network can be saved, and another ``Reconstruction`` can resume with the next.

    Args:
        network: Prepared network with ranges.
        plan: Plan of the network.
        settings: Settings with the ``reconstruction`` iterations of each block, and the seed.
        calls: Calls of the network on float states, each with its timestep; each rank has its own images, taken in
            turn.
        branches: Rows of an image in the network's batch: 2 with classifier-free guidance.

    Attributes:
        blocks: Names of the blocks in order of execution.
    """

    def __init__(
        self, network: nn.Module, plan: DenoiserPlan, settings: Settings, calls: Sequence[Call], branches: int = 1
    ) -> None:
        self.network, self.settings, self.calls, self.branches = network, settings, calls, branches
        self.blocks = blocks_of(network, plan)

    def run(self, block: str) -> dict[str, float]:
        """Reconstruct a block and return the mean squared error of its output ``before`` and ``after``.

        The error ``after`` is never larger.

        Raises:
            ConfigurationError: Name that is not in ``blocks``.
        """
        if block not in self.blocks:
            raise ConfigurationError(f"{block!r} is not a block: expected one of {', '.join(self.blocks)}.")
        seed = self.settings.seed * 1_000_003 + self.blocks.index(block)
        with evaluating(self.network):
            data = gather(self.network, block, self.calls, self.branches)
            schedule = Schedule(self.settings.reconstruction, seed=seed)
            return reconstruct_block(self.network, block, data, schedule)


def reconstruct_block(network: nn.Module, block: str, data: BlockData, schedule: Schedule) -> dict[str, float]:
    """Learn the rounding of a block's weights and the ranges of its activations.

    Adam minimizes the squared error of the output, summed over channels and averaged over the rest, plus 0.01 times the
    penalty, which drives the rounding, soft at first, to 0 or 1. All ranks draw the same batch, each takes its own
    images of it, and gradients are summed.

    Args:
        network: Prepared network with ranges, in eval mode.
        block: Name of the block.
        data: Inputs and targets from :func:`gather`.
        schedule: Schedule with iterations, rates, batch and seed.

    Returns:
        Mean squared errors ``before`` and ``after`` on all data. If learning does not lower the error, the block is
        restored, and both are equal.
    """
    module = network.get_submodule(block)
    weights = (quantizer for _, quantizer in _weights(module))
    quantizers: list[RoundedQuantizer | TimestepQuantizer] = [*weights, *activation_quantizers(module).values()]
    before = block_error(module, data)
    states = [{key: tensor.clone() for key, tensor in q.state_dict().items()} for q in quantizers]
    try:
        _learn(module, data, schedule)
    except BaseException:
        for quantizer in quantizers:
            quantizer.cancel()
        raise
    for quantizer in quantizers:
        quantizer.end()
    after = block_error(module, data)
    if after < before:
        return {"before": before, "after": after}
    # Also reached if the error is NaN.
    for quantizer, state in zip(quantizers, states, strict=True):
        quantizer.load_state_dict(state)
    return {"before": before, "after": before}


@torch.no_grad()
def block_error(module: nn.Module, data: BlockData) -> float:
    """Return the mean squared error of a block's output on the data of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=data.device)
    for start in range(0, len(data), BATCH):
        output, target = data.run(module, torch.arange(start, min(start + BATCH, len(data))))
        sums += torch.stack([(output.double() - target).square().sum(), sums.new_tensor(target.numel())])
    return float(torch.div(*all_reduce_sum(sums)))


def _weights(module: nn.Module) -> list[tuple[QuantizedLayer, RoundedQuantizer]]:
    """Return the layers of a block whose rounding is learned, with their weight quantizers."""
    layers = ((layer, layer.weight_quantizer) for _, layer in quantized_layers(module))
    return [(layer, quantizer) for layer, quantizer in layers if isinstance(quantizer, RoundedQuantizer)]


def _learn(module: nn.Module, data: BlockData, schedule: Schedule) -> None:
    alphas, groups = _begin(module, schedule)
    leaves: list[Tensor] = [leaf for group in groups for leaf in group["params"]]  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(groups)
    _, ranks = rank_and_ranks()
    with torch.enable_grad():
        for iteration, images in enumerate(_batches(len(data.places), schedule)):
            loss = _data_loss(module, data, images)
            beta = schedule.beta(iteration)
            if beta is not None and alphas:
                flat = torch.cat([alpha.flatten() for alpha in alphas])
                loss = loss + PENALTY / ranks * rounding_penalty(flat, beta)
            _give_gradients(loss, leaves)
            optimizer.step()


def _begin(module: nn.Module, schedule: Schedule) -> tuple[list[Tensor], list[dict[str, object]]]:
    """Start the learning of a block's quantizers; return the rounding variables and the parameter groups by rate."""
    rate, activation_rate = schedule.rates
    alphas = []
    by_rate: dict[float, list[Tensor]] = {}
    for layer, quantizer in _weights(module):
        leaves = quantizer.begin(layer.weight, soft=True)
        leaves["log_ratio"].requires_grad_(False)
        alphas.append(leaves["alpha"])
    for activation in activation_quantizers(module).values():
        leaves = activation.begin()
        by_rate.setdefault(activation_rate, []).append(leaves["log_ratio"])
        # Scaled so that a zero point moves as far as the end of the range moves with the step size.
        by_rate.setdefault(activation_rate * activation.grid.high, []).append(leaves["zero_point"])
    by_rate.setdefault(rate, []).extend(alphas)
    return alphas, [{"params": params, "lr": lr} for lr, params in by_rate.items() if params]


def _batches(images: int, schedule: Schedule) -> Iterator[Tensor]:
    """Yield the images of each iteration, the same on all ranks: all in turn, in a new order each epoch."""
    size = min(schedule.batch, images)
    generator = torch.Generator().manual_seed(schedule.seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(schedule.iterations):
        if len(order) < size:
            order = torch.randperm(images, generator=generator)
        yield order[:size]
        order = order[size:]


def _data_loss(module: nn.Module, data: BlockData, images: Tensor) -> Tensor:
    """Return this rank's share of the images' squared error, summed over channels and averaged over the rest."""
    rows = data.of(images)
    if not len(rows):
        return torch.zeros((), device=data.device)
    output, target = data.run(module, rows)
    channels = target.shape[1] if target.dim() == 4 else target.shape[-1]
    total = target[0].numel() * data.places.shape[1] * len(images) / channels
    return (output.float() - target.float()).square().sum() / total


def _give_gradients(loss: Tensor, leaves: list[Tensor]) -> None:
    """Set the leaves' gradients, summed over ranks in one collective; the network's parameters get none."""
    local: Sequence[Tensor | None] = [None] * len(leaves)
    if loss.requires_grad:
        local = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, local, strict=True)]
    if several_ranks():
        flat = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([leaf.numel() for leaf in leaves])
        gradients = [part.view_as(leaf) for leaf, part in zip(leaves, parts, strict=True)]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
