"""How near images are to those of another model, image by image, computed by torchmetrics."""

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

# Two equal images count as this many dB, so that a mean over images stays finite. 8-bit images that differ in a single
# level of one in 10^5 values are already nearer than that.
HIGHEST_PSNR = 100.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
# Pixels below which a layer of the network has no output left.
LPIPS_SMALLEST: dict[LpipsNet, int] = {"alex": 31, "vgg": 16, "squeeze": 17}


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal to noise ratio of each image in dB, ``-10 log10`` of its mean squared error, at most 100.

    Args:
        images: (n, C, H, W) in [0, 1].
        reference: same shape.

    Returns:
        (n,).

    Example:
        >>> psnr(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5)).round()
        tensor([20.])
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=HIGHEST_PSNR)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image under a Gaussian window of 11 x 11 pixels and a deviation of 1.5.

    Images smaller than that get the largest odd window that fits into them, the deviation smaller in the same
    measure: 7 x 7 for images of 8 x 8. Such a number compares with others of that image size only.

    Args:
        images: (n, C, H, W) in [0, 1].
        reference: same shape.

    Returns:
        (n,), at most 1.

    Raises:
        UnavailableError: images of fewer than 3 x 3 pixels.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> ssim(x, x)
        tensor([1., 1.])
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(images.shape[-2:])
    if side < 3:
        raise UnavailableError(f"images of {side} pixels have no window of 3")
    # torchmetrics makes a Gaussian window 2 round(3.5 sigma) + 1 wide.
    sigma = SSIM_SIGMA if side >= SSIM_WINDOW else (side - 1) // 2 / 3.5
    # The mean over the whole image, mirrored at its border: which part torchmetrics averages differs between releases.
    _, everywhere = structural_similarity_index_measure(
        images, reference, sigma=sigma, data_range=1.0, reduction="none", return_full_image=True
    )
    return everywhere.flatten(1).mean(1)


def lpips_network(net: LpipsNet = "alex", weights_path: str | Path | None = None) -> nn.Module:
    """The network of LPIPS, with the linear weights that torchmetrics ships.

    Args:
        net: its backbone.
        weights_path: of the backbone, a file as torchvision publishes it; None: torchvision fetches it.

    Raises:
        ConfigurationError: no such backbone, no such file.
        CheckpointError: the file holds another network.
        UnavailableError: the weights cannot be had.
    """
    if net not in LPIPS_SMALLEST:
        raise ConfigurationError(f"lpips_net='{net}': expected one of {', '.join(LPIPS_SMALLEST)}.")
    network: nn.Module = with_weights(f"the backbone '{net}' of LPIPS", weights_path, lambda path: _lpips(net, path))
    return network


def lpips(network: nn.Module, images: Tensor, reference: Tensor) -> Tensor:
    """Learned perceptual distance of each image; Zhang et al., CVPR 2018.

    Args:
        network: of :func:`lpips_network`.
        images: (n, 3, H, W) in [0, 1].
        reference: same shape.

    Returns:
        (n,).

    Raises:
        UnavailableError: images that are too small for the backbone.
    """
    smallest = LPIPS_SMALLEST[network.pnet_type]  # type: ignore[index]
    side = min(images.shape[-2:])
    if side < smallest:
        raise UnavailableError(f"images of {side} pixels; LPIPS by '{network.pnet_type}' needs {smallest}")
    found: Tensor = network(images, reference, normalize=True)
    return found.reshape(len(images))


def clip_model(clip: str | Path | Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Model and processor of CLIP.

    Args:
        clip: name or local folder for transformers, or a function that returns both.

    Raises:
        UnavailableError: transformers or the weights are not here.
    """
    if callable(clip):
        return clip()

    def load(path: str | None) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        source = local_path(clip)
        return CLIPModel.from_pretrained(source).eval(), CLIPProcessor.from_pretrained(source)

    found: tuple[Any, Any] = with_weights(f"CLIP '{clip}'", None, load)
    return found


def clip_scores(model: Any, processor: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """``100 cos`` between image and prompt, at least 0; Hessel et al., "CLIPScore", EMNLP 2021.

    Args:
        model: of CLIP.
        processor: of that model.
        images: (n, 3, H, W) in [0, 1].
        prompts: n of them.

    Returns:
        (n,).
    """
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    scores, _ = _clip_score_update(to_bytes(images), list(prompts), model, processor)
    return scores.clamp_min(0)


def _lpips(net: LpipsNet, path: str | None) -> nn.Module:
    # The class that the public metric holds: only this one can be built without a download.
    from torchmetrics.functional.image.lpips import _LPIPS

    if path is None:
        return _LPIPS(net=net)
    network = _LPIPS(net=net, pnet_rand=True)
    stored = _read(path)
    # "slice2.3.weight" and "slices.1.3.squeeze.weight" are "features.3." in torchvision.
    names = {name: re.sub(r"^slice(s\.)?\d+\.", "features.", name) for name in network.net.state_dict()}
    network.net.load_state_dict({name: stored[theirs] for name, theirs in names.items()})
    return network


def _read(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return stored
