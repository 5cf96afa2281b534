"""Classification networks from timm, torchvision or Python, and their initial weights."""

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
    """Create a classification network with its initial weights.

    Args:
        model: Name in ``timm.list_models()``; ``torchvision/`` followed by a name in
            ``torchvision.models.list_models(torchvision.models)``; or a network, which is returned.
        num_classes: Width of the classifier. If the pretrained weights have another width, the classifier stays
            random.
        pretrained: Start from the library's published weights (a download); for torchvision the ``DEFAULT`` ones.
        checkpoint_path: Local ``.safetensors``, ``.pth`` or ``.ckpt`` file of the same network to start from.
        model_kwargs: Further arguments of ``timm.create_model`` or ``torchvision.models.get_model``.

    Raises:
        ConfigurationError: Unknown name, missing file, or arguments for a network that is already built.
        CheckpointError: A file whose tensors do not fit the network.

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
                f"model is a {type(model).__name__} that is already built, found pretrained={pretrained} and "
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
        # Listed names do not include the tag of the weights after the dot.
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ConfigurationError(
            f"timm knows no network '{name}'. Near: {', '.join(near) or 'nothing'}. "
            "timm.list_models('*resnet*') lists the names."
        )
    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    return network


def _from_torchvision(name: str, num_classes: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    names = torchvision.models.list_models(torchvision.models)
    if name not in names:
        near = [_TORCHVISION + match for match in difflib.get_close_matches(name, names, n=5)]
        raise ConfigurationError(
            f"torchvision knows no network '{name}'. Near: {', '.join(near) or 'nothing'}. "
            "torchvision.models.list_models(torchvision.models) lists the names."
        )
    network: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **kwargs)
    if pretrained:
        _load_published(network, name, torchvision.models.get_model_weights(name).DEFAULT)
    return network


def _load_published(network: nn.Module, name: str, weights: Any) -> None:
    """Load published weights; as in timm, a classifier of another width keeps its random weights."""
    state, published = network.state_dict(), weights.get_state_dict(progress=False, check_hash=True)
    classes = len(weights.meta["categories"])
    head = {key for key, value in published.items() if value.shape[:1] == (classes,) != state[key].shape[:1]}
    try:
        network.load_state_dict({key: state[key] if key in head else value for key, value in published.items()})
    except RuntimeError as error:
        raise CheckpointError(f"torchvision's weights of {name} do not fit these model_kwargs: {error}") from error


def _load_weights(network: nn.Module, name: str, path: str) -> None:
    def without_prefix(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """Remove the prefix 'network.' that a LightningModule checkpoint adds to the keys of its network."""
        if not state.keys().isdisjoint(network.state_dict()):
            return state
        return {key.removeprefix("network."): value for key, value in state.items()}

    try:
        load_checkpoint(network, path, filter_fn=without_prefix)
    except RuntimeError as error:
        raise CheckpointError(
            f"'{path}' does not hold the weights of {name} with this num_classes and model_kwargs: {error}"
        ) from error
