"""What of a denoiser is reconstructed at a time, what comes into it, and what should come out of it.

Source: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (arXiv 2102.05426),
on the blocks of denoisers as Li et al., "Q-Diffusion" (arXiv 2302.04304).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_quant.accuquant.plan import DenoiserPlan
from lightning_quant.accuquant.trajectories import device_of
from lightning_quant.errors import QuantizationError, UnsupportedModelError
from lightning_quant.nn.attention import QuantizedAttention, attention_form
from lightning_quant.nn.structure import in_float
from lightning_quant.quantizers.timestep import TimestepQuantizer
from lightning_quant.utilities.distributed import all_reduce_max, all_reduce_sum, several_ranks

# Classes of diffusers that are one block, whatever they are derived from or made of; and all attentions outside them.
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
# More than this is kept in main memory.
LIMIT = 4 * 2**30
# A call of the network on some states, and their timestep.
Call = tuple[Callable[[], object], "float | Tensor"]
# Arguments by position or keyword.
Arguments = dict["int | str", Any]


def blocks_of(network: nn.Module, plan: DenoiserPlan) -> list[str]:
    """Names of the modules that are reconstructed one after the other, as they are executed.

    Residual and transformer blocks as a whole, attentions outside them, and each layer that is left alone: every
    quantized layer is in exactly one.

    Args:
        network: prepared, or still in float.
        plan: of it.
    """
    return list(dict.fromkeys(_block_of(network, row.name) for row in plan.chosen("layer")))


def _block_of(network: nn.Module, layer: str) -> str:
    """The outermost block around a layer, or the layer."""
    parts = layer.split(".")
    around = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((name for name in around if _is_block(network.get_submodule(name))), layer)


def _is_block(module: nn.Module) -> bool:
    if any(kind.__name__ in BLOCKS for kind in type(module).__mro__):
        return True
    return isinstance(module, QuantizedAttention) or attention_form(type(module)) is not None


@dataclass
class BlockData:
    """What a block met in some calls of the network, one call after the other.

    Attributes:
        places: (images, branches), where in the rows of this rank each image of all ranks is; -1 for other ranks'.
        device: of the network.
        inputs: by position or keyword, the tensors with a row for each row of the batch, (rows, ...).
        constants: the other arguments, which were the same in all calls.
        targets: output of the float network, (rows, ...).
        timesteps: (rows,).
    """

    places: Tensor
    device: torch.device
    inputs: dict[int | str, Tensor] = field(default_factory=dict)
    constants: Arguments = field(default_factory=dict)
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.targets)

    def of(self, images: Tensor) -> Tensor:
        """The rows of this rank among those of some images of all ranks."""
        rows = self.places[images].flatten()
        return rows[rows >= 0]

    def run(self, block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Output of a block for some rows at their timesteps, and what it should be."""
        for quantizer in block.modules():
            if isinstance(quantizer, TimestepQuantizer) and len(quantizer.starts) > 1:
                quantizer.at(self.timesteps[rows])
        rows = rows.to(self.targets.device)
        chosen = {name: tensor[rows].to(self.device) for name, tensor in self.inputs.items()}
        return call_with(block, {**chosen, **self.constants}), self.targets[rows].to(self.device)


def call_with(block: nn.Module, arguments: Arguments) -> Tensor:
    """The output of a module, the first of several."""
    positional = sorted(name for name in arguments if isinstance(name, int))
    keywords = {name: value for name, value in arguments.items() if isinstance(name, str)}
    return _first(block(*(arguments[place] for place in positional), **keywords))


def gather(network: nn.Module, block: str, calls: Sequence[Call], branches: int = 1) -> BlockData:
    """Inputs of a block in the quantized network, and its outputs in the float network.

    The network runs as far as the block. Before it everything is quantized as it is by now, so that the block can make
    up for what was lost there.

    Args:
        network: prepared, with ranges.
        block: name of the block.
        calls: of the network; on each rank with its own images, in the same order of timesteps.
        branches: rows that an image has in a batch: 2 with classifier-free guidance, [all of one, all of the other].

    Raises:
        UnsupportedModelError: a block that is not called, or with arguments that differ from call to call.
        QuantizationError: outputs of the float network that are not finite.
    """
    module = network.get_submodule(block)
    with torch.no_grad():
        inputs = _captured(module, block, [call for call, _ in calls], through=False)
        with in_float(network):
            outputs = _captured(module, block, [call for call, _ in calls], through=True)
    rows = [_rows(found) for found in inputs]
    device = device_of(network, torch.device("cpu"))
    data = BlockData(_places(rows, branches, device), device)
    if not inputs:
        return data
    data.targets = torch.cat([found.pop(0) for found in outputs])
    _check_finite(data.targets, block)
    each = zip(calls, rows, strict=True)
    data.timesteps = torch.cat([torch.as_tensor(t, device="cpu").reshape(-1).expand(n) for (_, t), n in each])
    for name in list(inputs[0]):
        # Taken out one after the other: together they may be large.
        values = [found.pop(name, None) for found in inputs]
        if all(_has_rows(value, n) for value, n in zip(values, rows, strict=True)):
            data.inputs[name] = torch.cat([v.expand(n, *v.shape[1:]) for v, n in zip(values, rows, strict=True)])
        else:
            data.constants[name] = _constant(values, f"{name!r} of {block}")
    return data


class _Reached(Exception):  # noqa: N818
    """The network came to the block."""


def _captured(module: nn.Module, name: str, calls: Sequence[Callable[[], object]], through: bool) -> list[Arguments]:
    """Arguments of a module in each call; what it returned, as {0: output}, where the network goes through it."""
    found: list[Arguments] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments: Arguments = {}
        arguments.update(enumerate(args))
        arguments.update(kwargs.items())
        found.append(arguments)
        raise _Reached

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append({0: _first(output)})
        raise _Reached

    handle: Any = (
        module.register_forward_hook(after) if through else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        for call in calls:
            _run_into(call, name)
            found[-1] = _kept(found[-1], len(calls))
    finally:
        handle.remove()
    return found


def _run_into(call: Callable[[], object], name: str) -> None:
    try:
        call()
    except _Reached:
        return
    raise UnsupportedModelError(f"{name} was not called in a call of the network: leave it out, exclude=[{name!r}].")


def _kept(arguments: Arguments, calls: int) -> Arguments:
    """Where there is room for as much from each of the calls."""
    size = sum(v.numel() * v.element_size() for v in arguments.values() if isinstance(v, Tensor)) * calls
    return {name: v.cpu() if isinstance(v, Tensor) and size > LIMIT else v for name, v in arguments.items()}


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    assert isinstance(found, Tensor)
    return found


def _rows(arguments: Arguments) -> int:
    return next(len(value) for value in arguments.values() if isinstance(value, Tensor) and value.dim())


def _has_rows(value: Any, rows: int) -> bool:
    """Whether it has a row for each of the batch, or one for all of them."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) in (1, rows)


def _constant(values: list[Any], name: str) -> Any:
    first = values[0]
    for value in values[1:]:
        both = isinstance(value, Tensor) and isinstance(first, Tensor)
        if not (torch.equal(value, first) if both else value is first or value == first):
            raise UnsupportedModelError(
                f"The argument {name} is {first!r} in one call and {value!r} in another, and has no row for each image:"
                " such a block cannot be reconstructed, write reconstruction=0."
            )
    return first


def _check_finite(targets: Tensor, block: str) -> None:
    if not bool(targets.isfinite().all()):
        raise QuantizationError(
            f"The float network's {block} gives NaN or infinity: run it in FP32, precision='32-true', or leave the"
            " block out with exclude."
        )


def _places(rows: list[int], branches: int, device: torch.device) -> Tensor:
    """See :class:`BlockData`: rank by rank the first images of a call, then their second ones, ..., then the next call.

    Where ranks take images in turn this is the order that one rank has for all of them.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several_ranks() else (0, 1)
    calls = int(all_reduce_max(torch.tensor(len(rows), device=device)))
    counts = torch.zeros(ranks, calls, dtype=torch.int64, device=device)
    counts[rank, : len(rows)] = torch.tensor(rows, device=device)
    counts, start = all_reduce_sum(counts).cpu(), 0
    # A layer that is called once for the whole batch has no branches.
    branches = branches if not bool((counts % branches).any()) else 1
    places = []
    for numbers in (counts // branches).T:
        turn, owner = torch.cartesian_prod(torch.arange(int(numbers.max())), torch.arange(ranks)).T
        turn, owner = turn[turn < numbers[owner]], owner[turn < numbers[owner]]
        own = int(numbers[rank])
        row = start + turn[:, None] + own * torch.arange(branches)
        places.append(torch.where(owner[:, None] == rank, row, -1))
        start += own * branches
    if not places or not sum(map(len, places)):
        raise QuantizationError("No rank has a call of the network to reconstruct from: give more trajectories.")
    return torch.cat(places)
