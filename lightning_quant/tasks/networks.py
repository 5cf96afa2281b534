"""Networks by name, from timm or torchvision, or as they are given, and their first weights."""

import difflib
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.models import load_checkpoint
from torch import Tensor, nn

import lightning_quant.models  # noqa: F401  (registers the CIFAR networks with timm)
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.utilities.paths import user_path

_TORCHVISION = "torchvision/"


def create_network(
    model: str | nn.Module,
    num_classes: int,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A classification network with its first weights.

    Args:
        model: A name of ``timm.list_models()``, ``torchvision/`` and a name of
            ``torchvision.models.list_models(torchvision.models)``, or a network, which is returned.
        num_classes: Width of the classifier; pretrained weights of another width leave it random.
        pretrained: Start from the library's published weights (a download), torchvision's ``DEFAULT`` ones.
        checkpoint_path: Start from a local ``.safetensors``, ``.pth`` or ``.ckpt`` of the same network.
        model_kwargs: Further arguments of ``timm.create_model`` or ``torchvision.models.get_model``.

    Raises:
        ConfigurationError: For an unknown name, a missing file, or arguments for a network that exists already.
        CheckpointError: If the file's tensors are not those of the network.

    Example:
        >>> create_network("torchvision/vit_b16", num_classes=10)
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: torchvision knows no network 'vit_b16'. Near: torchvision/vit_b_16...
    """
    path = None if checkpoint_path is None else user_path(checkpoint_path)
    if path is not None and not path.is_file():
        raise ConfigurationError(
            f"No file '{path}'. Write checkpoint_path=FILE, a .safetensors, .pth or .ckpt file, "
            "or leave it out to start from random weights."
        )
    match model:
        case nn.Module() if pretrained or model_kwargs:
            raise ConfigurationError(
                f"model is a {type(model).__name__} that exists already, found pretrained={pretrained} and "
                f"model_kwargs={model_kwargs} beside it. Leave them out, or write a name as model."
            )
        case nn.Module():
            network = model
        case str() if model.startswith(_TORCHVISION):
            name = model.removeprefix(_TORCHVISION)
            network = _from_torchvision(name, num_classes, pretrained, model_kwargs or {})
        case _:
            network = _from_timm(model, num_classes, pretrained, model_kwargs or {})
    if path is not None:
        _load_weights(network, model if isinstance(model, str) else type(model).__name__, str(path))
    return network


def _from_timm(name: str, num_classes: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        # The tag of the weights, after the dot, is not part of the names in the list.
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ConfigurationError(
            f"timm knows no network '{name}'. Near: {', '.join(near) or 'nothing'}. "
            "timm.list_models('*resnet*') lists what there is."
        )
    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    return network


def _from_torchvision(name: str, num_classes: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        near = [_TORCHVISION + each for each in difflib.get_close_matches(name, known, n=5)]
        raise ConfigurationError(
            f"torchvision knows no network '{name}'. Near: {', '.join(near) or 'nothing'}. "
            "torchvision.models.list_models(torchvision.models) lists what there is."
        )
    network: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **kwargs)
    if pretrained:
        _load_published(network, name, torchvision.models.get_model_weights(name).DEFAULT)
    return network


def _load_published(network: nn.Module, name: str, weights: Any) -> None:
    """As in timm, a classifier of another width keeps its random weights."""
    own, published = network.state_dict(), weights.get_state_dict(progress=False, check_hash=True)
    classes = len(weights.meta["categories"])
    head = {key for key, value in published.items() if value.shape[:1] == (classes,) != own[key].shape[:1]}
    try:
        network.load_state_dict({key: own[key] if key in head else value for key, value in published.items()})
    except RuntimeError as error:
        raise CheckpointError(f"torchvision's weights of {name} do not fit these model_kwargs: {error}") from error


def _load_weights(network: nn.Module, name: str, path: str) -> None:
    def without_prefix(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """In a checkpoint of a LightningModule all keys of the network start with 'network.'."""
        if not state.keys().isdisjoint(network.state_dict()):
            return state
        return {key.removeprefix("network."): value for key, value in state.items()}

    try:
        load_checkpoint(network, path, filter_fn=without_prefix)
    except RuntimeError as error:
        raise CheckpointError(
            f"'{path}' does not hold the weights of {name} with this num_classes and model_kwargs: {error}"
        ) from error
