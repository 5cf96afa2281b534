"""Recording of the calls of a module's quantized part during a run, to be repeated later."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.nn.modes import never_compiled
from lightning_quant.nn.structure import quantizers_of


@dataclass(frozen=True)
class Call:
    """Arguments of one forward call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def images(self) -> int:
        """Number of rows of the first tensor; 1 if there is none."""
        tensors = (x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.dim())
        return next((len(tensor) for tensor in tensors), 1)

    def run(self, network: nn.Module) -> Any:
        """Repeat the call on a network."""
        return network(*self.args, **self.kwargs)


def quantized_root(module: nn.Module) -> str:
    """Return the name of the smallest submodule that contains all quantizers. Empty for the module itself.

    Example:
        >>> from lightning_quant.nn import swap
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> module = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))})
        >>> for layer in (module["net"][0], module["net"][2]):
        ...     _ = swap(layer, FixedQuantizer(4), FixedQuantizer(4))
        >>> quantized_root(module)
        'net'
    """
    # Names of layers, without the slot. A single quantized layer is a root itself.
    owners = [name.rpartition(".")[0].split(".") for name, _ in quantizers_of(module)]
    shared: list[str] = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    # A ModuleList or ModuleDict is never called.
    while shared and isinstance(module.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return ".".join(shared)


class Recorder:
    """Recorder of a uniform random sample of the calls of a module, up to a number of images.

    Args:
        module: Module whose forward is recorded.
        images: Minimum number of images to record, if there are that many. Calls are recorded whole.
        seed: Seed of the sample.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> recorder = Recorder(layer, images=4)
        >>> for _ in range(5):
        ...     _ = layer(Tensor([[0.0], [1.0]]))
        >>> recorder.stop()
        >>> len(recorder.calls), recorder.seen
        (2, 5)
    """

    def __init__(self, module: nn.Module, images: int = 32, seed: int = 0) -> None:
        self.images, self.calls, self.seen = images, list[Call](), 0
        self._random = random.Random(seed)
        self._handle: RemovableHandle = module.register_forward_pre_hook(never_compiled(self._record), with_kwargs=True)

    def stop(self) -> None:
        """Stop recording."""
        self._handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen += 1
        position = len(self.calls)
        if sum(call.images for call in self.calls) >= self.images:
            # Reservoir sampling, which does not need the total number of calls.
            position = self._random.randrange(self.seen)
            if position >= len(self.calls):
                return
        call = Call(tuple(map(_copy, args)), {key: _copy(value) for key, value in kwargs.items()})
        self.calls[position : position + 1] = [call]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value
