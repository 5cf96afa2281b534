"""Quantized structure of a module: saved in the state dict with the weights, and rebuilt from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.nn.attention import attention_form, restore_attention, swap_attention, swapped_attentions
from lightning_quant.nn.attention_mixin import SLOTS
from lightning_quant.nn.forms import obstacle
from lightning_quant.nn.layers import QUANTIZERS, QuantizedLayer, restore, swap
from lightning_quant.nn.quantized_module import HINT
from lightning_quant.nn.timesteps import unwatch_timesteps, watch_timesteps
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.base import quantizer_of_state
from lightning_quant.utilities.hashing import tensors_hash

_STATE = "._extra_state"
REBUILDING_HOOK = "_rebuilds_when_loading"
# Only an opened nn.MultiheadAttention has this layer.
_UNPACKED = ".in_proj.weight"


def mark(state_dict: dict[str, Tensor], callback: str) -> None:
    """Add the key that tells a float module what to do with this state dict.

    Args:
        state_dict: State dict of a quantized module.
        callback: Name of the callback that quantized it.

    Example:
        >>> state = {}
        >>> mark(state, "IGQViT")
        >>> list(state)
        ["lightning_quant: this checkpoint is quantized; add IGQViT to the Trainer's callbacks, or load it with
          lightning_quant.load_from_checkpoint(YourModule, path)"]
    """
    what = f"add {callback} to the Trainer's callbacks, or load it with"
    state_dict[f"{HINT}{what} lightning_quant.load_from_checkpoint(YourModule, path)"] = torch.tensor(True)


def quantizers_of(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Iterate over the name and quantizer of each slot in use, under every name that the module has for it."""
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, Quantizer) and name.rpartition(".")[2] in (*QUANTIZERS, *SLOTS):
            yield name, child


def is_quantized(module: nn.Module) -> bool:
    """Return whether any layer is quantized or any attention is open."""
    return any(True for _ in (*quantized_layers(module), *swapped_attentions(module)))


def rebuild(module: nn.Module, state_dict: Mapping[str, Tensor], opened: Iterable[str] = ()) -> None:
    """Give a float module the quantized structure of a state dict. A quantized module is left unchanged.

    Args:
        module: Module with the layers and attentions of the saved module.
        state_dict: State dict of a quantized module.
        opened: Names of further attentions to open. The state dict identifies those that have a quantizer, and every
            ``nn.MultiheadAttention``.

    Raises:
        CheckpointError: The module lacks a quantized layer, or the version or kind of a quantizer is unknown.

    Example:
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> quantized, plain = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        >>> _ = swap(quantized[0], weight_quantizer=FixedQuantizer(6, axis=0))
        >>> rebuild(plain, quantized.state_dict())
        >>> plain[0].weight_quantizer
        FixedQuantizer(bits=6, ready=False)
    """
    structure: dict[str, dict[str, Tensor]] = {name: {} for name in opened}
    for key, value in state_dict.items():
        owner, _, slot = key.removesuffix(_STATE).rpartition(".")
        if key.endswith(_STATE) and slot in (*QUANTIZERS, *SLOTS):
            structure.setdefault(owner, {})[slot] = value
    modules = dict(module.named_modules(remove_duplicate=False))
    unpacked = (key.removesuffix(_UNPACKED) for key in state_dict if key.endswith(_UNPACKED))
    opened_mha = (name for name in unpacked if type(modules.get(name)) is nn.MultiheadAttention)
    structure.update({name: structure.get(name, {}) for name in opened_mha})
    if not structure or is_quantized(module):
        return
    # Attentions come first, since opening one may add layers to it.
    layers = {name: slots for name, slots in structure.items() if slots and slots.keys() <= {*QUANTIZERS}}
    attentions = {name: slots for name, slots in structure.items() if name not in layers}
    for name, slots in _once(module, attentions, lambda child: attention_form(type(child)) is not None):
        parent = module.get_submodule(name.rpartition(".")[0]) if name else None
        swap_attention(module.get_submodule(name), **_quantizers(slots), parent=parent)
    for name, slots in _once(module, layers, lambda child: not obstacle(child)):
        swap(module.get_submodule(name), **_quantizers(slots))
    watch_timesteps(module)


def _quantizers(slots: Mapping[str, Tensor]) -> dict[str, Any]:
    return {slot: quantizer_of_state(state) for slot, state in slots.items()}


def _once(
    module: nn.Module, structure: dict[str, dict[str, Tensor]], fits: Callable[[nn.Module], bool]
) -> list[tuple[str, dict[str, Tensor]]]:
    """Return the name and slots of each module once, since the state dict has a shared module under each name."""
    modules = dict(module.named_modules(remove_duplicate=False))
    missing = [name for name in structure if name not in modules or not fits(modules[name])]
    if missing:
        raise CheckpointError(
            f"The checkpoint quantizes {missing[0]!r} and {len(missing) - 1} other layers that {type(module).__name__}"
            " does not have: create the module with the arguments with which it was trained."
        )
    return list({id(modules[name]): (name, slots) for name, slots in reversed(structure.items())}.values())


def rebuild_when_loading(module: nn.Module) -> None:
    """Make a float module adopt the structure of a quantized state dict when that is loaded."""
    if REBUILDING_HOOK not in vars(module):
        handle = module.register_load_state_dict_pre_hook(_rebuild_first)  # type: ignore[no-untyped-call]
        setattr(module, REBUILDING_HOOK, handle)


def _rebuild_first(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if not prefix:
        rebuild(module, state_dict)


Module = TypeVar("Module", bound=nn.Module)


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Iterate over the name and layer of each quantized layer, each layer once."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedLayer):
            yield name, child


def strip(module: Module) -> Module:
    """Turn all quantized layers and opened attentions of a module back to float, in place, and return the module.

    The weights are the trained float weights, and the state dict is that of the float network.

    Example:
        >>> from lightning_quant.nn import Bits, plan_layers, swap
        >>> from lightning_quant.quantizers import LearnedQuantizer
        >>> network = nn.Sequential(nn.Linear(2, 2))
        >>> _ = swap(network[0], LearnedQuantizer(4))
        >>> list(strip(network).state_dict())
        ['0.weight', '0.bias']
    """
    unwatch_timesteps(module)
    for _, layer in list(quantized_layers(module)):
        restore(layer)
    for _, attention in list(swapped_attentions(module)):
        restore_attention(attention)
    return module


@contextmanager
def in_float(module: nn.Module, owners: Collection[str] | None = None) -> Iterator[None]:
    """Run a quantized module in float: take its quantizers out of their slots, and put them back afterwards.

    Args:
        module: Quantized module.
        owners: Names of the layers and attentions to run in float. None means all.

    Example:
        >>> import torch
        >>> from lightning_quant.nn import swap
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> network = nn.Sequential(nn.Linear(4, 4)).eval()
        >>> x = torch.randn(2, 4)
        >>> expected = network(x)
        >>> _ = swap(network[0], FixedQuantizer(4), FixedQuantizer(4))
        >>> with in_float(network):
        ...     torch.equal(network(x), expected)
        True
    """
    removed = []
    for name, quantizer in list(quantizers_of(module)):
        owner, _, slot = name.rpartition(".")
        if owners is not None and owner not in owners:
            continue
        removed.append((module.get_submodule(owner), slot, quantizer))
    for parent, slot, _ in removed:
        parent._modules[slot] = None
    try:
        yield
    finally:
        for parent, slot, quantizer in removed:
            parent._modules[slot] = quantizer


def weights_hash(network: nn.Module) -> str:
    """Compute the SHA-256 of the parameters and buffers of a network, without its quantizers.

    Args:
        network: Float or quantized network. Both have the same hash.

    Example:
        >>> from lightning_quant.nn import swap
        >>> from lightning_quant.quantizers import FixedQuantizer
        >>> network = nn.Sequential(nn.Linear(2, 2))
        >>> in_float = weights_hash(network)
        >>> _ = swap(network[0], weight_quantizer=FixedQuantizer(4, axis=0))
        >>> weights_hash(network) == in_float
        True
    """
    quantizers = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Quantizer))
    named = [*network.named_parameters(), *network.named_buffers()]
    return tensors_hash((name, tensor) for name, tensor in named if not name.startswith(quantizers))
