"""Calls of the quantized part of somebody's module, kept while a run goes on, to be made again."""

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
    """Arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def images(self) -> int:
        """Rows of the first tensor; 1 where there is none."""
        tensors = (each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor) and each.dim())
        return next((len(each) for each in tensors), 1)

    def run(self, network: nn.Module) -> Any:
        """Make it again."""
        return network(*self.args, **self.kwargs)


def quantized_root(module: nn.Module) -> str:
    """Name of the smallest submodule that holds all that is quantized; empty for the module itself.

    Example:
        >>> from lightning_quant.nn import swap
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> module = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))})
        >>> for layer in (module["net"][0], module["net"][2]):
        ...     _ = swap(layer, FixedQuantizer(4), FixedQuantizer(4))
        >>> quantized_root(module)
        'net'
    """
    # Without the slot; a layer that is the only one is a root itself.
    owners = [name.rpartition(".")[0].split(".") for name, _ in quantizers_of(module)]
    shared: list[str] = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    # A list or dict of modules is never called.
    while shared and isinstance(module.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return ".".join(shared)


class Recorder:
    """Keeps some of the calls of a module, each of all that come with the same chance, up to a number of images.

    Args:
        module: whose forward is recorded.
        images: how many rows of a batch are kept at least, where there are as many; a call is kept whole.
        seed: of the choice.

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
        self._handle: RemovableHandle = module.register_forward_pre_hook(never_compiled(self._heard), with_kwargs=True)

    def stop(self) -> None:
        """Listen no more."""
        self._handle.remove()

    def _heard(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen += 1
        place = len(self.calls)
        if sum(call.images for call in self.calls) >= self.images:
            # Reservoir sampling, which needs not know how many will come.
            place = self._random.randrange(self.seen)
            if place >= len(self.calls):
                return
        call = Call(tuple(map(_kept, args)), {key: _kept(value) for key, value in kwargs.items()})
        self.calls[place : place + 1] = [call]


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _kept(each) for key, each in value.items()}
    return type(value)(map(_kept, value)) if type(value) in (list, tuple) else value
