"""Quantized models as folders: weight codes in safetensors, the structure in JSON, no executable content."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError, UnsupportedModelError
from lightning_quant.export.build import check_build, construct, deduce
from lightning_quant.export.folder import WRITER, Description, read_folder, write_folder
from lightning_quant.functional.grid import decode, encode
from lightning_quant.functional.packing import pack_bits, unpack_bits
from lightning_quant.nn.attention import swapped_attentions
from lightning_quant.nn.structure import quantized_layers, quantizers_of, rebuild
from lightning_quant.quantizers import FixedQuantizer, LearnedQuantizer, Quantizer, RoundedQuantizer
from lightning_quant.quantizers.base import quantizer_of_state
from lightning_quant.utilities.files import check_replaceable
from lightning_quant.utilities.paths import user_path

_STATE = "_extra_state"


def save_quantized(model: nn.Module, folder: str | Path, build: Mapping[str, Any] | None = None) -> Path:
    """Write a quantized model as a folder with ``model.safetensors`` and ``quantization.json``.

    Weights on a grid are stored as bit-packed codes, all other tensors unchanged. The float values behind the codes
    are not kept, whether rounding was to nearest or learned. An earlier folder is replaced once the new one is
    complete. In a distributed run rank 0 writes.

    Args:
        model: Model that was calibrated, or trained with quantizers; it is not changed.
        folder: Folder to write; missing parents are created.
        build: Recipe for the float network: ``{"class_path": "timm.create_model", "init_args": {...}}``, or the
            import path of an ``nn.Module`` class with JSON arguments. None deduces it for LightningModules with saved
            hyperparameters and for networks of timm, torchvision and diffusers; where that fails,
            :func:`load_quantized` needs the float network.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: Model without quantizers.
        QuantizationError: No quantizer has a range yet, or some are still learning.
        ConfigurationError: Folder with other files, or a ``build`` that makes another network.

    Example:
        >>> import tempfile
        >>> from lightning_quant.nn import swap
        >>> network, plain = (nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 2)) for _ in range(2))
        >>> layer = swap(network[0], weight_quantizer=FixedQuantizer(4, symmetric=False, axis=0))
        >>> layer.weight_quantizer.initialize(layer.weight)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     loaded = load_quantized(save_quantized(network, parent + "/four_bits"), model=plain)
        >>> x = torch.randn(3, 64)
        >>> torch.equal(loaded(x), network(x))
        True
    """
    folder = user_path(folder)
    check_replaceable(folder, WRITER)
    _check_started(model)
    if getattr(rank_zero_only, "rank", 0):
        return folder
    recipe = deduce(model) if build is None else check_build(model, build)
    if recipe is None:
        rank_zero_info(
            f"No recipe to build this {type(model).__name__} was found: load_quantized({str(folder)!r}, model=...) will"
            " need the float network. Or write save_quantized(..., build={'class_path': ..., 'init_args': {...}})."
        )
    tensors, tied = _distinct(model)
    prefixes = tuple(f"{name}." for name, _ in quantizers_of(model))
    elements = sum(tensor.numel() for key, tensor in tensors.items() if not key.startswith(prefixes))
    packed = {}
    for key, quantizer in _coded(model):
        weight = tensors[key]
        packed[key] = {"bits": quantizer.bits, "shape": list(weight.shape), "dtype": str(weight.dtype)[6:]}
        tensors[key] = pack_bits(_codes(quantizer, weight) - quantizer.grid.low, quantizer.bits)
        # A RoundedQuantizer keeps the same codes.
        tensors.pop(_quantizer_of(key) + "codes", None)
    on_cpu = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_folder(folder, on_cpu, Description(_modules(model), packed, tied, recipe, 4 * elements))
    return folder


def load_quantized(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load the quantized model from a folder that :func:`save_quantized` wrote, in eval mode, on the CPU.

    Its outputs equal those of the saved model bit for bit. Its weights are on their grids.

    Args:
        folder: Folder with ``model.safetensors`` and ``quantization.json``.
        model: Float network to load into, in place. Needed if the folder has no recipe to build it.

    Raises:
        CheckpointError: Files that are missing, truncated or changed, that have an unknown version, or that belong to
            another network than ``model``; or no way to build the network.
    """
    folder = user_path(folder)
    tensors, description = read_folder(folder)
    if model is None and description.build is None:
        raise CheckpointError(
            f"{folder} has no recipe to build the float network: write load_quantized({str(folder)!r},"
            " model=network) with the float network that was quantized."
        )
    network = construct(description.build or {}) if model is None else model
    try:
        state = _state(tensors, description)
        rebuild(network, state, opened=[name for name, slots in description.modules.items() if not slots])
        _take_dtypes(network, state)
        network.load_state_dict(state)
        for _, layer in quantized_layers(network):
            if layer.weight_quantizer is not None:
                layer.weight_quantizer.adopt(layer.weight)
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} does not fit this {type(network).__name__}: {error}\nPass the float network that was quantized,"
            " built with the same arguments, as model=."
        ) from error
    return network.eval()


def _check_started(model: nn.Module) -> None:
    quantizers = [quantizer for _, quantizer in quantizers_of(model)]
    if not quantizers:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not quantized: calibrate it with the callback IGQViT, or train it with"
            " GradientQuantization, before save_quantized(model, folder)."
        )
    for quantizer in quantizers:
        if not quantizer.ready:  # Ranges may have been set from outside, without a forward.
            quantizer.refresh_ready()
    if not any(quantizer.ready for quantizer in quantizers):
        raise QuantizationError(
            f"None of the {len(quantizers)} quantizers of {type(model).__name__} has a range yet: run the calibration"
            " or the training before save_quantized(model, folder)."
        )
    learning = [name for name, quantizer in quantizers_of(model) if getattr(quantizer, "learns", False)]
    if learning:
        raise QuantizationError(
            f"{len(learning)} quantizers of {type(model).__name__} still learn, for example {learning[0]}: let the"
            " calibration finish before save_quantized(model, folder)."
        )
    with torch.no_grad():
        for _, layer in quantized_layers(model):
            if layer.weight_quantizer is not None:
                layer.weight_quantizer.check(layer.weight)


def _modules(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """Return the extra states by module and slot; an opened attention without quantizers has no slots."""
    states: dict[str, dict[str, list[int]]] = {name: {} for name, _ in swapped_attentions(model)}
    for name, quantizer in quantizers_of(model):
        owner, _, slot = name.rpartition(".")
        states.setdefault(owner, {})[slot] = quantizer.get_extra_state().tolist()
    return states


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the distinct tensors of the state dict, and the tied names with the name that holds their tensor."""
    # Fingerprints describe the float weights, which are not kept.
    slots = {f"{name}.{key}" for name, _ in quantizers_of(model) for key in (_STATE, "fingerprint")}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for key, value in model.state_dict().items():
        if key in slots:
            continue
        if not isinstance(value, Tensor):
            raise ConfigurationError(
                f"{key} in the state dict is a {type(value).__name__}, but a folder holds only tensors: let"
                " get_extra_state of that module return a tensor."
            )
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (key,)
        if names.setdefault(place, key) == key:
            tensors[key] = value
        else:
            tied[key] = names[place]
    return tensors, tied


def _coded(model: nn.Module) -> Iterator[tuple[str, FixedQuantizer | LearnedQuantizer]]:
    """Yield the name and quantizer of each weight that its codes reproduce and that no other module uses."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        # A weight computed from other parameters is not in the state dict.
        if "weight" not in layer._parameters:
            continue
        if not isinstance(quantizer, FixedQuantizer | LearnedQuantizer) or not quantizer.ready:
            continue
        codes = _codes(quantizer, layer.weight)
        again = _codes(quantizer, _real(quantizer, codes, layer.weight.dtype))
        if holders[id(layer.weight)] == 1 and torch.equal(codes, again):
            yield f"{name}.weight".lstrip("."), quantizer


def _quantizer_of(weight: str) -> str:
    """Return the state-dict prefix of a weight's quantizer."""
    return weight.removesuffix("weight") + "weight_quantizer."


@torch.no_grad()
def _codes(quantizer: FixedQuantizer | LearnedQuantizer, weight: Tensor) -> Tensor:
    if isinstance(quantizer, RoundedQuantizer):
        return quantizer.signed_codes
    scale, zero_point = quantizer.affine(weight.dim())
    return encode(weight, scale, quantizer.grid, zero_point)


@torch.no_grad()
def _real(quantizer: FixedQuantizer | LearnedQuantizer, codes: Tensor, dtype: torch.dtype) -> Tensor:
    return decode(codes, *quantizer.affine(codes.dim())).to(dtype)


def _state(tensors: Mapping[str, Tensor], description: Description) -> dict[str, Tensor]:
    """Return the state dict: decoded weights, tied tensors under all of their names, and the extra states."""
    state = dict(tensors)
    for owner, slots in description.modules.items():
        for slot, values in slots.items():
            state[f"{owner}.{slot}.{_STATE}".lstrip(".")] = torch.tensor(values)
    # The codes of a RoundedQuantizer follow below, with its weight.
    state.update({name: tensors[source] for name, source in description.tied.items() if source in tensors})
    for key, weight in description.packed.items():
        shape = weight["shape"]
        codes = unpack_bits(tensors[key], weight["bits"], math.prod(shape)).view(shape)
        quantizer = _quantizer(_quantizer_of(key), state, codes)
        state[key] = _real(quantizer, codes + quantizer.grid.low, getattr(torch, weight["dtype"]))
    state.update({name: state[source] for name, source in description.tied.items()})
    return state


def _quantizer(prefix: str, state: dict[str, Tensor], codes: Tensor) -> FixedQuantizer | LearnedQuantizer:
    """Return the quantizer of a weight with these codes; add them to ``state`` if the quantizer keeps them."""
    entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    quantizer: Quantizer = quantizer_of_state(entries[_STATE])
    if isinstance(quantizer, RoundedQuantizer):
        entries["codes"] = state[f"{prefix}codes"] = codes.to(quantizer.codes.dtype)
    quantizer.load_state_dict(entries)
    assert isinstance(quantizer, FixedQuantizer | LearnedQuantizer)
    return quantizer


def _take_dtypes(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Cast parameters and buffers to the saved dtype: loading FP32 values into BF16 weights would round them."""
    targets = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in targets.items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
