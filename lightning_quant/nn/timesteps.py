"""Hooks that pass the timestep of a denoiser's call to the quantizers that depend on it."""

from __future__ import annotations

import inspect
from typing import Any, TypeGuard

from torch import Tensor, nn

from lightning_quant.quantizers.timestep import TimestepQuantizer, group_of

NAMES = ("timestep", "timesteps", "t")
HOOK, ARGUMENT = "_tells_timesteps", "_timestep_argument"


def watch_timesteps(module: nn.Module) -> None:
    """Make each module that is called with a timestep pass it to the timestep-dependent quantizers inside it.

    The timestep is the argument of the call, so the range is right for samplers with several calls per step, for
    guidance, and for single calls from outside.

    Args:
        module: Module with quantized layers. Hooks are registered once, and only where a quantizer needs them.

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
    """Return the name and position of the timestep among the arguments of a class's forward."""
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    return next(((name, names.index(name)) for name in NAMES if name in names), None)


def _listeners(module: nn.Module) -> list[TimestepQuantizer]:
    return [child for child in module.modules() if isinstance(child, TimestepQuantizer) and len(child.starts) > 1]


def _is_timestep(value: Any) -> TypeGuard[float | Tensor]:
    """Return whether a value is one number, or one per image: blocks get timestep embeddings under the same name."""
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
