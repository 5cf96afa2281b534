"""Perturbation of the posteriors when the activation of one layer alone is quantized, by number of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_quant.errors import ConfigurationError
from lightning_quant.igq_vit.calibration_pass import Slot, fill
from lightning_quant.igq_vit.schemes import Candidates
from lightning_quant.utilities.attributes import replaced_attribute
from lightning_quant.utilities.distributed import all_reduce_sum


def log_posteriors(outputs: Any) -> Tensor:
    """Compute the log-probabilities of the classes, (items, classes) in FP64, of a classifier or a segmentation model.

    Args:
        outputs: Logits (images, classes) or (images, classes, height, width), or a mapping or an object that holds them
            as ``logits`` or ``out``.

    Raises:
        ConfigurationError: Outputs of any other form.

    Example:
        >>> log_posteriors(torch.zeros(2, 4)).exp().tolist()[0]
        [0.25, 0.25, 0.25, 0.25]
    """
    for name in ("logits", "out"):
        logits = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        outputs = outputs if logits is None else logits
    if not isinstance(outputs, Tensor) or outputs.dim() not in (2, 4) or outputs.shape[1] < 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigurationError(
            "The allocation of groups needs class posteriors: expected logits (images, classes[, height, width]),"
            f" found {shape}. Write allocate=False, or override IGQViT.log_posteriors."
        )
    return outputs.double().log_softmax(dim=1).movedim(1, -1).flatten(0, -2)


def divergence(reference: Tensor, changed: Tensor) -> float:
    """Compute KL(reference || changed) of log-probabilities (items, classes), averaged over the items of all ranks."""
    total = F.kl_div(changed, reference, log_target=True, reduction="sum")
    both = all_reduce_sum(torch.stack([total, total.new_tensor(len(reference))]))
    return float(both[0] / both[1])


class Replay:
    """Repeated runs of a network that start at the first block that a change can reach.

    Blocks are the elements of the network's ``nn.Sequential`` and ``nn.ModuleList``. Their outputs are kept from one
    float pass, and a later pass reuses those of the blocks that end before the changed module starts.

    Args:
        network: Network in float, all slots empty.
        forward: Function that runs the network on the calibration images.
        names: Names of the modules that will be changed.
    """

    def __init__(self, network: nn.Module, forward: Callable[[], Any], names: Sequence[str]) -> None:
        self.network, self.forward, self.names = network, forward, tuple(names)
        self.block_outputs: dict[str, Any] = {}
        self._start: dict[str, int] = {}
        self._end: dict[str, int] = {}
        self._clock = 0
        self.outputs = self._record(names)

    def _record(self, names: Sequence[str]) -> Any:
        blocks = self._blocks(names)
        handles = []
        for name in {*blocks, *names}:
            module = self.network.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._starts(name)))
            handles.append(module.register_forward_hook(self._ends(name, keep=name in blocks)))
        try:
            with torch.no_grad():
                return self.forward()
        finally:
            for handle in handles:
                handle.remove()

    def _blocks(self, names: Sequence[str]) -> set[str]:
        lists = [n for n, m in self.network.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
        prefixes = [f"{name}." if name else "" for name in lists]
        blocks = {
            f"{p}{i}" for p, n in zip(prefixes, lists, strict=True) for i in self.network.get_submodule(n)._modules
        }
        return {block for block in blocks if any(name.startswith(f"{block}.") for name in names)}

    def _starts(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._clock += 1
            if name in self._start:
                # Called twice: it is unknown which output a later pass needs.
                self.block_outputs.pop(name, None)
                self._end[name] = 1 << 62
            self._start.setdefault(name, self._clock)

        return hook

    def _ends(self, name: str, keep: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._clock += 1
            if name not in self._end:
                self._end[name] = self._clock
                if keep:
                    self.block_outputs[name] = output

        return hook

    def share(self, name: str) -> float:
        """Return the share of ``names`` that :meth:`run` calls again."""
        reused = tuple(f"{block}." for block in self._before(name))
        return sum(not other.startswith(reused) for other in self.names) / len(self.names)

    def _before(self, name: str) -> list[str]:
        """Return the recorded blocks that end before a module starts."""
        start = self._start.get(name, 0)
        return [block for block in self.block_outputs if self._end[block] < start]

    def run(self, name: str) -> Any:
        """Run the network with the module ``name`` as it is now and all blocks before it as recorded."""
        with ExitStack() as stack, torch.no_grad():
            for block in self._before(name):
                forward = _returning(self.block_outputs[block])
                stack.enter_context(replaced_attribute(self.network.get_submodule(block), "forward", forward))
            return self.forward()


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # A copy, since later modules may change it in place.
        return tree_map_only(Tensor, torch.clone, output)

    return forward


def perturbations(
    replay: Replay, reference: Tensor, slot: Slot, quantizers: Candidates, posteriors: Callable[[Any], Tensor]
) -> dict[int, float]:
    """Measure Omega of one layer: the divergence of the posteriors when only its activation is quantized.

    Args:
        replay: Replay of the network in float.
        reference: Log-probabilities of the float network.
        slot: Name of the module and of the slot.
        quantizers: Quantizers of the slot, keyed by number of groups.
        posteriors: Function from outputs to log-probabilities.

    Returns:
        Mean KL divergences, keyed by number of groups.
    """
    omega = {}
    try:
        for groups, quantizer in quantizers.items():
            fill(replay.network, {slot: quantizer})
            omega[groups] = divergence(reference, posteriors(replay.run(slot[0])))
    finally:
        fill(replay.network, {slot: None})
    return omega
