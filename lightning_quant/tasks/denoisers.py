"""Networks and schedulers of diffusers from arguments or folders, and the target that a network learns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError, UnsupportedModelError
from lightning_quant.utilities.paths import user_path

_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


def learned_target(scheduler: Any, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the target of the network's prediction for the ``prediction_type`` of a diffusers scheduler.

    Example:
        >>> import torch
        >>> images, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> scheduler = noise_scheduler({"prediction_type": "sample"})
        >>> torch.equal(learned_target(scheduler, images, noise, torch.tensor([500])), images)
        True
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return images
        case _:
            velocity: Tensor = scheduler.get_velocity(images, noise, timesteps)
            return velocity


def unet(network: Mapping[str, Any] | str | nn.Module) -> Any:
    """Return a ``UNet2DModel`` built from arguments, loaded from a folder, or passed through.

    Args:
        network: Arguments of ``UNet2DModel``; the folder of a network or of a pipeline, whose weights are loaded; or
            the network itself.

    Raises:
        ConfigurationError: Arguments that ``UNet2DModel`` does not accept, or a folder without a network.
        UnsupportedModelError: Network of another class.

    Example:
        >>> unet(nn.Linear(1, 1))
        Traceback (most recent call last):
        ...
        lightning_quant.errors.UnsupportedModelError: Expected a UNet2DModel of diffusers, found a Linear...
    """
    from diffusers import UNet2DModel
    from diffusers.utils.import_utils import is_accelerate_available

    match network:
        case UNet2DModel():
            return network
        case nn.Module():
            raise UnsupportedModelError(
                f"Expected a UNet2DModel of diffusers, found a {type(network).__name__}. "
                "Write ImageDiffusion(UNet2DModel(...)), or pass its arguments as a mapping."
            )
        case str():
            # diffusers loads networks in eval mode, and Lightning would leave them in it.
            folder = _folder_with(network, "unet", "config.json")
            return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=is_accelerate_available()).train()
        case _:
            return _built(UNet2DModel, network)


def noise_scheduler(scheduler: Mapping[str, Any] | str | None) -> Any:
    """Return a DDIMScheduler or DDPMScheduler built from arguments or from a folder.

    Args:
        scheduler: Arguments, with the class as ``_class_name`` unless it is DDIMScheduler; or the folder of a
            scheduler or of a pipeline. None uses the defaults of diffusers.

    Raises:
        ConfigurationError: Another class, arguments that the class does not accept, an unknown ``prediction_type``,
            or a folder without a scheduler.

    Example:
        >>> noise_scheduler({"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}).config.prediction_type
        'v_prediction'
    """
    import diffusers

    arguments: Mapping[str, Any]
    if isinstance(scheduler, str):
        name = "scheduler_config.json"
        arguments = json.loads((_folder_with(scheduler, "scheduler", name) / name).read_text(encoding="utf-8"))
    else:
        arguments = scheduler or {}
    kind = arguments.get("_class_name", _SCHEDULERS[0])
    if kind not in _SCHEDULERS:
        raise ConfigurationError(
            f"Training takes a {' or '.join(_SCHEDULERS)}, found a {kind}. Other samplers can be made from the config "
            "of either after training."
        )
    built = _built(getattr(diffusers, kind), arguments)
    if built.config.prediction_type not in _PREDICTIONS:
        raise ConfigurationError(
            f"Expected prediction_type {', '.join(_PREDICTIONS)}, found '{built.config.prediction_type}'."
        )
    return built


def described(configured: Any) -> dict[str, Any]:
    """Return the arguments and ``_class_name`` of a diffusers network or scheduler as plain values.

    Example:
        >>> described(noise_scheduler({"beta_end": 0.01}))["beta_end"]
        0.01
    """
    config: dict[str, Any] = json.loads(configured.to_json_string())
    return config


def _folder_with(folder: str, inside: str, name: str) -> Path:
    """Return the folder that holds the file: the given one, or its subfolder ``inside`` if it is a pipeline's."""
    parent = user_path(folder)
    for candidate in (parent, parent / inside):
        if (candidate / name).is_file():
            return candidate
    raise ConfigurationError(
        f"No {name} in '{parent}' or '{parent / inside}'. Write the folder of a diffusers pipeline, or arguments."
    )


def _built(cls: Any, arguments: Mapping[str, Any]) -> Any:
    """Build a diffusers object and refuse unknown arguments, for which diffusers only warns."""
    parameters = [name for name in signature(cls.__init__).parameters if name != "self"]
    kwargs = {name: value for name, value in arguments.items() if not name.startswith("_")}
    if unknown := sorted(kwargs.keys() - set(parameters)):
        raise ConfigurationError(
            f"{cls.__name__} has no argument {', '.join(map(repr, unknown))}. It has {', '.join(parameters)}."
        )
    try:
        return cls(**kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"{cls.__name__} cannot be built from these arguments: {error}") from error
