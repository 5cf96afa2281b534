"""How much the posteriors move when the activation of one layer alone is quantized, by number of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_quant.errors import ConfigurationError
from lightning_quant.igq_vit.calibration_pass import Slot, fill
from lightning_quant.igq_vit.schemes import Candidates
from lightning_quant.utilities.distributed import all_reduce_sum


def log_posteriors(outputs: Any) -> Tensor:
    """Log-probabilities of the classes, (items, classes) FP64, of what a classifier or a segmenter returns.

    Args:
        outputs: logits (images, classes) or (images, classes, height, width), or a mapping or a named tuple that
            has them as ``logits`` or ``out``.

    Raises:
        ConfigurationError: anything else.

    Example:
        >>> log_posteriors(torch.zeros(2, 4)).exp().tolist()[0]
        [0.25, 0.25, 0.25, 0.25]
    """
    for name in ("logits", "out"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        outputs = outputs if found is None else found
    if not isinstance(outputs, Tensor) or outputs.dim() not in (2, 4) or outputs.shape[1] < 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigurationError(
            f"Groups are allocated by the posteriors of classes, expected logits (images, classes[, height, width]),"
            f" found {shape}: write allocate=False, or override IGQViT.log_posteriors."
        )
    return outputs.double().log_softmax(dim=1).movedim(1, -1).flatten(0, -2)


def divergence(reference: Tensor, changed: Tensor) -> float:
    """Mean over the items of all ranks of KL(reference || changed), of log-probabilities (items, classes)."""
    total = F.kl_div(changed, reference, log_target=True, reduction="sum")
    both = all_reduce_sum(torch.stack([total, total.new_tensor(len(reference))]))
    return float(both[0] / both[1])


class Replay:
    """Runs a network again, from the first block on that a change can reach.

    Blocks are the elements of its ``nn.Sequential`` and ``nn.ModuleList``. Their outputs are kept from one pass in
    float; a later pass takes those of the blocks that end before the changed module starts.

    Args:
        network: in float, all slots empty.
        forward: runs it on the calibration images.
        names: modules that will be changed.
    """

    def __init__(self, network: nn.Module, forward: Callable[[], Any], names: Sequence[str]) -> None:
        self.network, self.forward, self.names = network, forward, tuple(names)
        self.kept: dict[str, Any] = {}
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
                # Called twice: which output a later pass needs is not known.
                self.kept.pop(name, None)
                self._end[name] = 1 << 62
            self._start.setdefault(name, self._clock)

        return hook

    def _ends(self, name: str, keep: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._clock += 1
            if name not in self._end:
                self._end[name] = self._clock
                if keep:
                    self.kept[name] = output

        return hook

    def share(self, name: str) -> float:
        """Share of the modules given that :meth:`run` calls again."""
        done = tuple(f"{block}." for block in self._before(name))
        return sum(not other.startswith(done) for other in self.names) / len(self.names)

    def _before(self, name: str) -> list[str]:
        """Recorded blocks that end before a module starts."""
        start = self._start.get(name, 0)
        return [block for block in self.kept if self._end[block] < start]

    def run(self, name: str) -> Any:
        """Outputs of the network with the module ``name`` as it is now and all before it as recorded."""
        with ExitStack() as stack, torch.no_grad():
            for block in self._before(name):
                forward = _returning(self.kept[block])
                stack.enter_context(mock.patch.object(self.network.get_submodule(block), "forward", forward))
            return self.forward()


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # A copy, since what follows may work in place.
        return tree_map_only(Tensor, torch.clone, output)

    return forward


def perturbations(
    replay: Replay, reference: Tensor, slot: Slot, quantizers: Candidates, posteriors: Callable[[Any], Tensor]
) -> dict[int, float]:
    """Omega of one layer: the divergence of the posteriors with only its activation quantized, by number of groups.

    Args:
        replay: of the network in float.
        reference: log-probabilities of the float network.
        slot: name of the module and of the slot.
        quantizers: by number of groups.
        posteriors: from outputs to log-probabilities.
    """
    found = {}
    try:
        for groups, quantizer in quantizers.items():
            fill(replay.network, {slot: quantizer})
            found[groups] = divergence(reference, posteriors(replay.run(slot[0])))
    finally:
        fill(replay.network, {slot: None})
    return found
