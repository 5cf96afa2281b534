"""Tells quantizers whose range depends on the timestep which one the denoiser was called with."""

from __future__ import annotations

import inspect
from typing import Any, TypeGuard

from torch import Tensor, nn

from lightning_quant.quantizers.timestep import TimestepQuantizer, group_of

NAMES = ("timestep", "timesteps", "t")
HOOK, ARGUMENT = "_tells_timesteps", "_timestep_argument"


def watch_timesteps(module: nn.Module) -> None:
    """Let every module that is called with a timestep tell it to the quantizers in it; nothing where none wants it.

    The timestep is the argument that the sampler gives, so that samplers with several calls a step, guidance and
    single calls from outside all find the right range.

    Args:
        module: with quantized layers; hooks are set once.

    Example:
        >>> class Denoiser(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.quantizer = TimestepQuantizer(8, starts=(900, 400))
        ...     def forward(self, sample, timestep):
        ...         return self.quantizer(sample)
        >>> denoiser = Denoiser()
        >>> watch_timesteps(denoiser)
        >>> import torch
        >>> _ = denoiser(torch.zeros(1), timestep=30)
        >>> denoiser.quantizer.group
        1
    """
    for child in module.modules():
        position = _position(type(child))
        if HOOK not in vars(child) and position is not None and _listeners(child):
            vars(child)[ARGUMENT] = position
            setattr(child, HOOK, child.register_forward_pre_hook(_tell, with_kwargs=True))


def unwatch_timesteps(module: nn.Module) -> None:
    """Undo :func:`watch_timesteps`."""
    for child in module.modules():
        handle = vars(child).pop(HOOK, None)
        if handle is not None:
            handle.remove()
            del vars(child)[ARGUMENT]


def _position(kind: type[nn.Module]) -> tuple[str, int] | None:
    """Name and place of the timestep among the arguments of a class's forward."""
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    return next(((name, names.index(name)) for name in NAMES if name in names), None)


def _listeners(module: nn.Module) -> list[TimestepQuantizer]:
    return [child for child in module.modules() if isinstance(child, TimestepQuantizer) and len(child.starts) > 1]


def _is_timestep(value: Any) -> TypeGuard[float | Tensor]:
    """A number, or one for each image: blocks are given the embedding of the timestep under the same names."""
    if isinstance(value, Tensor):
        return value.numel() in (1, *value.shape[:1])
    return isinstance(value, int | float)


def _tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name, place = getattr(module, ARGUMENT)
    timestep = kwargs.get(name, args[place] if place < len(args) else None)
    if not _is_timestep(timestep):
        return
    groups: dict[tuple[int, ...], int | Tensor] = {}
    for quantizer in _listeners(module):
        if quantizer.starts not in groups:
            groups[quantizer.starts] = group_of(quantizer.starts, timestep)
        quantizer.group = groups[quantizer.starts]
