"""Similarity of each image to that of another model, computed by torchmetrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError, UnavailableError
from lightning_quant.metrics.features import to_bytes, with_weights
from lightning_quant.utilities.paths import local_path

LpipsNet: TypeAlias = Literal["alex", "vgg", "squeeze"]

# PSNR in dB for two equal images, so that a mean over images is finite. For comparison: 8-bit images that differ by a
# single level in one of 10^5 values have 98 dB.
HIGHEST_PSNR = 100.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
# Smallest side of an image in pixels for which every layer of the network has an output.
LPIPS_SMALLEST: dict[LpipsNet, int] = {"alex": 31, "vgg": 16, "squeeze": 17}


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image in dB: ``-10 log10`` of its MSE, at most 100.

    Args:
        images: Images of shape (n, C, H, W) in [0, 1].
        reference: Reference images, same shape.

    Returns:
        PSNR of each image, (n,).

    Example:
        >>> psnr(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5)).round()
        tensor([20.])
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp(max=HIGHEST_PSNR)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Compute the structural similarity of each image, with a Gaussian window of 11 x 11 pixels and sigma 1.5.

    Smaller images get the largest odd window that fits into them and a proportionally smaller sigma: 7 x 7 for images
    of 8 x 8. Such values are comparable only between images of the same size.

    Args:
        images: Images of shape (n, C, H, W) in [0, 1].
        reference: Reference images, same shape.

    Returns:
        SSIM of each image, (n,), at most 1.

    Raises:
        UnavailableError: The images have fewer than 3 x 3 pixels.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> ssim(x, x)
        tensor([1., 1.])
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(images.shape[-2:])
    if side < 3:
        raise UnavailableError(f"images with a side of {side} pixels are smaller than the smallest window of 3")
    # The Gaussian window of torchmetrics has width 2 round(3.5 sigma) + 1.
    sigma = SSIM_SIGMA if side >= SSIM_WINDOW else (side - 1) // 2 / 3.5
    # Mean over the whole image with reflected borders, since releases of torchmetrics average different parts of it.
    _, everywhere = structural_similarity_index_measure(
        images, reference, sigma=sigma, data_range=1.0, reduction="none", return_full_image=True
    )
    return everywhere.flatten(1).mean(1)


def lpips_network(net: LpipsNet = "alex", weights_path: str | Path | None = None) -> nn.Module:
    """Create the network of LPIPS, with the linear weights that torchmetrics ships.

    Args:
        net: Backbone of the network.
        weights_path: Local file with the backbone's weights as published by torchvision. None downloads them.

    Raises:
        ConfigurationError: The backbone is unknown, or the file does not exist.
        CheckpointError: The file holds another network.
        UnavailableError: The weights cannot be downloaded.
    """
    if net not in LPIPS_SMALLEST:
        raise ConfigurationError(f"lpips_net='{net}': expected one of {', '.join(LPIPS_SMALLEST)}.")
    network: nn.Module = with_weights(f"the backbone '{net}' of LPIPS", weights_path, lambda path: _lpips(net, path))
    return network


def lpips(network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
    """Compute the learned perceptual distance of each image (Zhang et al., CVPR 2018).

    Args:
        network: Network from :func:`lpips_network`.
        images: Images of shape (n, 3, H, W) in [0, 1].
        reference: Reference images, same shape.

    Returns:
        Distance of each image, (n,).

    Raises:
        UnavailableError: The images are too small for the backbone.
    """
    smallest = LPIPS_SMALLEST[network.pnet_type]  # type: ignore[index]
    side = min(images.shape[-2:])
    if side < smallest:
        raise UnavailableError(
            f"images with a side of {side} pixels; LPIPS with '{network.pnet_type}' needs at least {smallest}"
        )
    distances: Tensor = network(images, reference, normalize=True)
    return distances.reshape(len(images))


def clip_model(clip: str | Path | Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Load the model and processor of CLIP.

    Args:
        clip: Name or local folder for transformers, or a function that returns both.

    Raises:
        UnavailableError: The package transformers or the weights are not available.
    """
    if callable(clip):
        return clip()

    def load(path: str | None) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        source = local_path(clip)
        return CLIPModel.from_pretrained(source).eval(), CLIPProcessor.from_pretrained(source)

    model_and_processor: tuple[Any, Any] = with_weights(f"CLIP '{clip}'", None, load)
    return model_and_processor


def clip_scores(model: Any, processor: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compute the CLIP score of each image, ``max(100 cos(image, prompt), 0)`` (Hessel et al., EMNLP 2021).

    Args:
        model: Model of CLIP.
        processor: Processor of the model.
        images: Images of shape (n, 3, H, W) in [0, 1].
        prompts: Prompts of the n images.

    Returns:
        Score of each image, (n,).
    """
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    scores, _ = _clip_score_update(to_bytes(images), list(prompts), model, processor)
    return scores.clamp_min(0)


def _lpips(net: LpipsNet, path: str | None) -> nn.Module:
    # The class inside the public metric, since only this one can be created without a download.
    from torchmetrics.functional.image.lpips import _LPIPS

    if path is None:
        return _LPIPS(net=net)
    network = _LPIPS(net=net, pnet_rand=True)
    stored = _read(path)
    # "slice2.3.weight" and "slices.1.3.squeeze.weight" are "features.3." in torchvision.
    names = {name: re.sub(r"^slice(s\.)?\d+\.", "features.", name) for name in network.net.state_dict()}
    network.net.load_state_dict({name: stored[torchvision_name] for name, torchvision_name in names.items()})
    return network


def _read(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return stored
