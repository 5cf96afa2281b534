"""Recipes for the float network of an artifact: a class or a library's factory, and its arguments as JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError
from lightning_quant.nn.attention import swapped_attentions
from lightning_quant.nn.structure import rebuild
from lightning_quant.quantizers import Quantizer

Build = dict[str, Any]
# Attributes that do not affect the output of a network in eval mode.
_IRRELEVANT = {"training", "execution", "grad_checkpointing"}


def construct(build: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """Build the float network with random weights, without touching the random state of the process.

    Args:
        build: Mapping with ``class_path``, ``init_args``, and ``imports`` if a module must be imported to register
            the network with timm.
        device: Device of the weights; "meta" allocates none.

    Raises:
        CheckpointError: A class that cannot be imported or is not an ``nn.Module``, or arguments that it refuses.

    Example:
        >>> construct({"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}})
        Linear(in_features=2, out_features=3, bias=True)
    """
    path, arguments = build.get("class_path"), build.get("init_args")
    if not isinstance(path, str) or not isinstance(arguments, Mapping):
        raise CheckpointError(
            f"build={dict(build)}: expected {{'class_path': 'package.Class', 'init_args': {{...}}}}, for example"
            " {'class_path': 'timm.create_model', 'init_args': {'model_name': 'vit_small_patch16_224'}}."
        )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            if "imports" in build:
                import_module(build["imports"])
            return _maker(path)(**_without_origin(path, arguments))
        except QuantizationError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path}({', '.join(f'{k}={v!r}' for k, v in arguments.items())}) does not build the network of the"
                f" artifact: {type(error).__name__}: {error}. Write load_quantized(folder, model=...) with the float"
                " network."
            ) from error


def _timm_network(model_name: str, **arguments: Any) -> nn.Module:
    if not timm.is_model(model_name):
        raise ValueError(f"timm knows no network {model_name!r}")
    network: nn.Module = timm.create_model(model_name, **arguments)
    return network


# Factories, with the arguments that keep them from fetching weights: those come from the artifact.
FACTORIES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "timm.create_model": (_timm_network, {"pretrained": False, "checkpoint_path": ""}),
    "torchvision.models.get_model": (torchvision.models.get_model, {"weights": None}),
}


def _without_origin(path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments without those that would fetch pretrained weights."""
    if path in FACTORIES:
        return {**arguments, **FACTORIES[path][1]}
    return {**arguments, **({"pretrained": False} if arguments.get("pretrained") is True else {})}


def _maker(path: str) -> Callable[..., nn.Module]:
    if path in FACTORIES:
        return FACTORIES[path][0]
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name) if module else None
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    raise CheckpointError(
        f"class_path={path!r}: expected {' or '.join(FACTORIES)}, or the import path of a subclass of torch.nn.Module,"
        " such as a LightningModule."
    )


def deduce(model: nn.Module) -> Build | None:
    """Deduce the recipe of a model's float network by trying candidates; None if none fits.

    Candidates come from the class and hyperparameters of a LightningModule, the class and config of a diffusers
    network, and the architecture and sizes of a timm or torchvision network. The modules of a network, unlike those
    of a LightningModule, must also agree in class and settings with those that the candidate builds.
    """
    if isinstance(model, pl.LightningModule):
        return next((build for build in _lightning(model) if not mismatch(model, build)), None)
    candidates = (*_timm(model), *_torchvision(model), *_diffusers(model))
    return next((build for build in candidates if not mismatch(model, build, settings=True)), None)


def mismatch(model: nn.Module, build: Mapping[str, Any], settings: bool = False) -> str:
    """Return the first difference between a model's float form and the network of a recipe; empty if none.

    Args:
        model: Quantized model.
        build: Recipe of the float network, see :func:`construct`.
        settings: Compare the plain attributes of all modules too.
    """
    try:
        # The recipe as it will be read back: JSON has no tuples.
        other = _without_weights(json.loads(json.dumps(build, allow_nan=False)))
        rebuild(other, model.state_dict(), opened=[name for name, _ in swapped_attentions(model)])
    except (QuantizationError, TypeError, ValueError) as error:
        return str(error)
    shapes, built = dict(_shapes(model)), dict(_shapes(other))
    for name in sorted(shapes.keys() | built.keys()):
        if shapes.get(name) != built.get(name):
            return (
                f"{name} is {shapes.get(name, 'missing')} in the model, {built.get(name, 'missing')} in the built one"
            )
    return _other_settings(model, other) if settings else ""


def _without_weights(build: Mapping[str, Any]) -> nn.Module:
    try:
        return construct(build, "meta")
    except CheckpointError:
        # Some constructors read values from tensors, which meta tensors do not have.
        return construct(build)


def _shapes(model: nn.Module) -> Iterator[tuple[str, object]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Quantizer):
            tensors = {**module._parameters, **module._buffers}
            for name, tensor in tensors.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}".lstrip("."), tuple(tensor.shape)


def _other_settings(model: nn.Module, other: nn.Module) -> str:
    """Return the first module whose class or plain attributes differ."""
    built_modules = dict(other.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        built = built_modules.pop(name, None)
        # Parametrizations give each module a class of its own.
        if built is None or type_before_parametrizations(built) is not type_before_parametrizations(module):
            return f"{name} is a {type(module).__name__}, in the built one a {type(built).__name__}"
        if not isinstance(module, Quantizer):
            for key in vars(built).keys() - _IRRELEVANT:
                value = vars(built)[key]
                if not key.startswith("_") and _is_plain(value) and _as_json(vars(module).get(key)) != _as_json(value):
                    return f"{name}.{key} is {vars(module).get(key)}, in the built one {value}"
    return f"{next(iter(built_modules))} is missing" if built_modules else ""


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _as_json(value: object) -> object:
    """Return a value with tuples as lists."""
    return [_as_json(element) for element in value] if isinstance(value, tuple | list) else value


def _lightning(model: pl.LightningModule) -> Iterator[Build]:
    kind = type(model)
    path = f"{kind.__module__}.{kind.__qualname__}"
    parameters = inspect.signature(kind).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind not in several}
    arguments = {name: value for name, value in model.hparams.items() if name in parameters}
    importable = kind.__module__ != "__main__" and "." not in kind.__qualname__
    if importable and required <= arguments.keys():
        yield {"class_path": path, "init_args": _without_origin(path, arguments)}


def _diffusers(model: nn.Module) -> Iterator[Build]:
    kind = type(model)
    if not any(base.__name__ == "ModelMixin" and base.__module__.startswith("diffusers.") for base in kind.__mro__):
        return
    parameters = inspect.signature(kind).parameters
    config: Any = getattr(model, "config", {})
    exported = getattr(import_module("diffusers"), kind.__name__, None) is kind
    path = f"diffusers.{kind.__name__}" if exported else f"{kind.__module__}.{kind.__qualname__}"
    yield {"class_path": path, "init_args": {name: value for name, value in config.items() if name in parameters}}


def _timm(model: nn.Module) -> Iterator[Build]:
    config: Any = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    if not architecture or not timm.is_model(architecture):
        return
    build: Build = {"class_path": "timm.create_model", "init_args": {"model_name": architecture}}
    home = timm.models.model_entrypoint(architecture).__module__
    if not home.startswith("timm."):
        build["imports"] = home
    # A subclass may pass its arguments on as **kwargs.
    accepted = {name for kind in type(model).__mro__ for name in inspect.signature(kind).parameters}
    observed = {name: value for name, value in _observed(model).items() if name in accepted and value is not None}
    # The fewest arguments that suffice: the rest follows from the architecture.
    for names in (("num_classes",), ("num_classes", "in_chans", "img_size", "global_pool"), tuple(observed)):
        arguments = {name: observed[name] for name in names if name in observed}
        yield {**build, "init_args": {**build["init_args"], **arguments}}


def _observed(model: Any) -> dict[str, Any]:
    """Return the constructor arguments that can be read off a timm network."""
    embed = getattr(model, "patch_embed", None)
    blocks = list(getattr(model, "blocks", ()))
    stages = [list(getattr(stage, "blocks", ())) for stage in getattr(model, "layers", ())]
    pool = getattr(model, "global_pool", None)
    heads = [stage[0].attn.num_heads for stage in stages if stage and hasattr(stage[0], "attn")]
    drops = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    return {
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None),
        "img_size": _listed(getattr(embed, "img_size", None)),
        "patch_size": _listed(getattr(embed, "patch_size", None)),
        "global_pool": pool if isinstance(pool, str) else getattr(pool, "pool_type", None),
        "embed_dim": getattr(model, "embed_dim", None),
        "depth": len(blocks) or None,
        "depths": list(map(len, stages)) or None,
        "num_heads": heads or (blocks[0].attn.num_heads if blocks and hasattr(blocks[0], "attn") else None),
        "drop_path_rate": max(drops, default=None),
    }


def _listed(size: Any) -> Any:
    return list(size) if isinstance(size, tuple) else size


def _torchvision(model: nn.Module) -> Iterator[Build]:
    home = type(model).__module__
    heads = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    if not home.startswith("torchvision.models.") or not heads:
        return
    arguments = {"num_classes": heads[-1]}
    if isinstance(getattr(model, "image_size", None), int):
        arguments["image_size"] = model.image_size  # type: ignore[assignment]
    for name in torchvision.models.list_models():
        if torchvision.models.get_model_builder(name).__module__ == home:
            yield {"class_path": "torchvision.models.get_model", "init_args": {"name": name, **arguments}}


def check_build(model: nn.Module, build: Mapping[str, Any]) -> Build:
    """Check a recipe that the user passed, and return it as it is stored in the artifact.

    Raises:
        ConfigurationError: Recipe whose network is not the float form of the model.
    """
    difference = mismatch(model, build)
    if difference:
        raise ConfigurationError(
            f"build={dict(build)} does not make the float form of this {type(model).__name__}: {difference}. Leave"
            " build out to have it deduced, or to pass the float network to load_quantized(folder, model=...)."
        )
    return dict(build)
