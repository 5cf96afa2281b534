"""Blocks of a denoiser that are reconstructed one at a time, with their inputs and float outputs.

Source: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (arXiv 2102.05426),
on the blocks of denoisers as Li et al., "Q-Diffusion" (arXiv 2302.04304).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.plan import DenoiserPlan
from lightning_quant.accuquant.trajectories import device_of
from lightning_quant.errors import QuantizationError, UnsupportedModelError
from lightning_quant.nn.attention import QuantizedAttention, attention_form
from lightning_quant.nn.structure import in_float
from lightning_quant.quantizers.timestep import TimestepQuantizer
from lightning_quant.utilities.distributed import all_reduce_max, all_reduce_sum, rank_and_ranks

# Classes of diffusers that form one block, subclasses included; so does each attention outside them.
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
# Inputs and outputs of a block that exceed this many bytes are moved to the CPU.
LIMIT = 4 * 2**30
# A call of the network on a batch of states, and its timestep.
Call = tuple[Callable[[], object], "float | Tensor"]
# Arguments by position or keyword.
Arguments = dict["int | str", Any]


def blocks_of(network: nn.Module, plan: DenoiserPlan) -> list[str]:
    """Return the names of the modules that are reconstructed, in order of execution.

    These are residual and transformer blocks, attentions outside them, and the remaining layers one by one: every
    quantized layer is in exactly one of them.

    Args:
        network: Network, prepared or still in float.
        plan: Plan of the network.
    """
    return list(dict.fromkeys(_block_of(network, row.name) for row in plan.chosen("layer")))


def _block_of(network: nn.Module, layer: str) -> str:
    """Return the outermost block around a layer, or the layer itself."""
    parts = layer.split(".")
    around = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((name for name in around if _is_block(network.get_submodule(name))), layer)


def _is_block(module: nn.Module) -> bool:
    if any(kind.__name__ in BLOCKS for kind in type(module).__mro__):
        return True
    return isinstance(module, QuantizedAttention) or attention_form(type(module)) is not None


@dataclass
class BlockData:
    """Inputs and float outputs of a block over several calls of the network, concatenated.

    Attributes:
        places: Row on this rank of each image of all ranks, (images, branches); -1 for images of other ranks.
        device: Device of the network.
        inputs: Tensor arguments with a row for each row of the batch, (rows, ...), by position or keyword.
        constants: Other arguments, which are the same in all calls.
        targets: Outputs of the float network, (rows, ...).
        timesteps: Timestep of each row, (rows,).
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
        """Return this rank's rows for a selection of the images of all ranks."""
        rows = self.places[images].flatten()
        return rows[rows >= 0]

    def run(self, block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return a block's output for some rows at their timesteps, and the target."""
        for quantizer in block.modules():
            if isinstance(quantizer, TimestepQuantizer) and len(quantizer.starts) > 1:
                quantizer.at(self.timesteps[rows])
        rows = rows.to(self.targets.device)
        inputs = {name: tensor[rows].to(self.device) for name, tensor in self.inputs.items()}
        return call_with(block, {**inputs, **self.constants}), self.targets[rows].to(self.device)


def call_with(block: nn.Module, arguments: Arguments) -> Tensor:
    """Call a module and return its output, or the first of several."""
    positional = sorted(name for name in arguments if isinstance(name, int))
    keywords = {name: value for name, value in arguments.items() if isinstance(name, str)}
    return _first(block(*(arguments[place] for place in positional), **keywords))


def gather(network: nn.Module, block: str, calls: Sequence[Call], branches: int = 1) -> BlockData:
    """Collect a block's inputs in the quantized network and its outputs in the float network.

    The network runs only as far as the block. Preceding layers are quantized in their current state, so that the
    block can compensate for their errors.

    Args:
        network: Prepared network with ranges.
        block: Name of the block.
        calls: Calls of the network; each rank has its own images, in the same order of timesteps.
        branches: Rows of an image in a batch: 2 with classifier-free guidance, all rows of one branch before those of
            the other.

    Raises:
        UnsupportedModelError: A block that is not called, or whose arguments differ from call to call.
        QuantizationError: Outputs of the float network that are not finite.
    """
    module = network.get_submodule(block)
    with torch.no_grad():
        inputs = _captured(module, block, [call for call, _ in calls], through=False)
        with in_float(network):
            outputs = _captured(module, block, [call for call, _ in calls], through=True)
    rows = [_rows(arguments) for arguments in inputs]
    device = device_of(network, torch.device("cpu"))
    data = BlockData(_places(rows, branches, device), device)
    if not inputs:
        return data
    data.targets = torch.cat([output.pop(0) for output in outputs])
    _check_finite(data.targets, block)
    counted = zip(calls, rows, strict=True)
    data.timesteps = torch.cat([torch.as_tensor(t, device="cpu").reshape(-1).expand(n) for (_, t), n in counted])
    for name in list(inputs[0]):
        # Popped one by one to free memory: together the inputs may be large.
        values = [arguments.pop(name, None) for arguments in inputs]
        if all(_has_rows(value, n) for value, n in zip(values, rows, strict=True)):
            data.inputs[name] = torch.cat([v.expand(n, *v.shape[1:]) for v, n in zip(values, rows, strict=True)])
        else:
            data.constants[name] = _constant(values, f"{name!r} of {block}")
    return data


class _Reached(Exception):  # noqa: N818
    """Signal that the network has reached the block."""


def _captured(module: nn.Module, name: str, calls: Sequence[Callable[[], object]], through: bool) -> list[Arguments]:
    """Return a module's arguments in each call, or with ``through`` its output as {0: output}."""
    captured: list[Arguments] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments: Arguments = {}
        arguments.update(enumerate(args))
        arguments.update(kwargs.items())
        captured.append(arguments)
        raise _Reached

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        captured.append({0: _first(output)})
        raise _Reached

    handle: Any = (
        module.register_forward_hook(after) if through else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        for call in calls:
            _run_into(call, name)
            captured[-1] = _kept(captured[-1], len(calls))
    finally:
        handle.remove()
    return captured


def _run_into(call: Callable[[], object], name: str) -> None:
    try:
        call()
    except _Reached:
        return
    raise UnsupportedModelError(f"The network did not call {name}: leave it out, exclude=[{name!r}].")


def _kept(arguments: Arguments, calls: int) -> Arguments:
    """Move tensors to the CPU if all calls together would exceed :data:`LIMIT`."""
    size = sum(v.numel() * v.element_size() for v in arguments.values() if isinstance(v, Tensor)) * calls
    return {name: v.cpu() if isinstance(v, Tensor) and size > LIMIT else v for name, v in arguments.items()}


def _first(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    assert isinstance(tensor, Tensor)
    return tensor


def _rows(arguments: Arguments) -> int:
    return next(len(value) for value in arguments.values() if isinstance(value, Tensor) and value.dim())


def _has_rows(value: Any, rows: int) -> bool:
    """Return whether a value has a row for each row of the batch, or one for all."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) in (1, rows)


def _constant(values: list[Any], name: str) -> Any:
    first = values[0]
    for value in values[1:]:
        both = isinstance(value, Tensor) and isinstance(first, Tensor)
        if not (torch.equal(value, first) if both else value is first or value == first):
            raise UnsupportedModelError(
                f"The argument {name} is {first!r} in one call and {value!r} in another, and has no row per image: such"
                " a block cannot be reconstructed, write reconstruction=0."
            )
    return first


def _check_finite(targets: Tensor, block: str) -> None:
    if not bool(targets.isfinite().all()):
        raise QuantizationError(
            f"The float network's {block} returns NaN or infinity: run it in FP32, precision='32-true', or leave the"
            " block out with exclude."
        )


def _places(rows: list[int], branches: int, device: torch.device) -> Tensor:
    """Return ``places`` of :class:`BlockData`: the first image of each rank, the second of each, ..., call by call.

    If ranks take images in turn, this is the order that a single rank has.
    """
    rank, ranks = rank_and_ranks()
    calls = int(all_reduce_max(torch.tensor(len(rows), device=device)))
    counts = torch.zeros(ranks, calls, dtype=torch.int64, device=device)
    counts[rank, : len(rows)] = torch.tensor(rows, device=device)
    counts, start = all_reduce_sum(counts).cpu(), 0
    # A layer that is called with one row for the whole batch has no branches.
    branches = branches if not bool((counts % branches).any()) else 1
    places = []
    for numbers in (counts // branches).T:
        turn, owner = torch.cartesian_prod(torch.arange(int(numbers.max())), torch.arange(ranks)).T
        turn, owner = turn[turn < numbers[owner]], owner[turn < numbers[owner]]
        local = int(numbers[rank])
        row = start + turn[:, None] + local * torch.arange(branches)
        places.append(torch.where(owner[:, None] == rank, row, -1))
        start += local * branches
    if not places or not sum(map(len, places)):
        raise QuantizationError("No rank has a call of the network to reconstruct from: write more trajectories.")
    return torch.cat(places)
