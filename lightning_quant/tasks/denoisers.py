"""Networks and schedulers of diffusers by their arguments or from folders, what a network learns, and its noise."""

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
    """What a network learns to predict by the ``prediction_type`` of a scheduler of diffusers.

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
    """A ``UNet2DModel`` by its arguments, from a folder, or as it is given.

    Args:
        network: Arguments; a folder of a network or of a pipeline with one, with weights; or the network.

    Raises:
        ConfigurationError: For arguments that it does not know or cannot be built of, or a folder without one.
        UnsupportedModelError: For another kind of network.

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
                "Write ImageDiffusion(UNet2DModel(...)), or its arguments as a mapping."
            )
        case str():
            # Diffusers reads networks in evaluation mode, which Lightning would leave them in.
            folder = _folder_with(network, "unet", "config.json")
            return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=is_accelerate_available()).train()
        case _:
            return _built(UNet2DModel, network)


def noise_scheduler(scheduler: Mapping[str, Any] | str | None) -> Any:
    """A DDIMScheduler or DDPMScheduler by its arguments or from a folder.

    Args:
        scheduler: Arguments, with the class as ``_class_name`` unless it is DDIMScheduler; or a folder of a
            scheduler or of a pipeline; None for diffusers' own arguments.

    Raises:
        ConfigurationError: For another class, arguments that it does not know, an unknown ``prediction_type``, or a
            folder without one.

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
            f"Trained with {' or '.join(_SCHEDULERS)}, found a {kind}. Another sampler can be made of the config of "
            "either when the training is done."
        )
    built = _built(getattr(diffusers, kind), arguments)
    if built.config.prediction_type not in _PREDICTIONS:
        raise ConfigurationError(
            f"Expected prediction_type {', '.join(_PREDICTIONS)}, found '{built.config.prediction_type}'."
        )
    return built


def described(configured: Any) -> dict[str, Any]:
    """The arguments of a network or scheduler of diffusers and its ``_class_name``, as plain values.

    Example:
        >>> described(noise_scheduler({"beta_end": 0.01}))["beta_end"]
        0.01
    """
    config: dict[str, Any] = json.loads(configured.to_json_string())
    return config


def _folder_with(folder: str, inside: str, name: str) -> Path:
    """The folder itself, or the one inside a pipeline's, that holds the file of that name."""
    whole = user_path(folder)
    for each in (whole, whole / inside):
        if (each / name).is_file():
            return each
    raise ConfigurationError(
        f"No {name} in '{whole}' or '{whole / inside}'. Write the folder of a diffusers pipeline, or arguments."
    )


def _built(cls: Any, arguments: Mapping[str, Any]) -> Any:
    """An object of diffusers, which by itself only warns of what it does not know."""
    known = [name for name in signature(cls.__init__).parameters if name != "self"]
    given = {name: value for name, value in arguments.items() if not name.startswith("_")}
    if unknown := sorted(given.keys() - set(known)):
        raise ConfigurationError(
            f"{cls.__name__} has no argument {', '.join(map(repr, unknown))}. It has {', '.join(known)}."
        )
    try:
        return cls(**given)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"{cls.__name__} cannot be built of these arguments: {error}") from error
