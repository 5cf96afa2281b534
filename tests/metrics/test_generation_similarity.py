"""Similarity of images against definitions written out, and what must not change it."""

import math
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor

from helpers.tiny_clip import TinyClip, tiny_processor
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.metrics import UnavailableError
from lightning_quant.metrics.similarity import (
    LPIPS_SMALLEST,
    LpipsNet,
    clip_model,
    clip_scores,
    lpips,
    lpips_network,
    psnr,
    ssim,
)

_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def pair(count: int, size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(size)
    x = torch.rand(count, channels, size, size, generator=random)
    return x, (x + 0.2 * torch.randn(x.shape, generator=random)).clamp(0, 1)


def test_psnr_is_that_of_each_image_by_hand() -> None:
    x, y = pair(4, 8)
    errors = (x.double() - y.double()).square().flatten(1).mean(1).tolist()
    assert psnr(x, y).tolist() == pytest.approx([-10 * math.log10(error) for error in errors], rel=1e-5)


def test_equal_images_have_the_highest_psnr_and_a_level_in_many_pixels_less() -> None:
    x = torch.full((1, 3, 32, 32), 0.5)
    almost = x.clone()
    almost[0, 0, 0, 0] += 1 / 255
    assert psnr(x, x).tolist() == [100.0]
    assert psnr(x, almost) < 100


def ssim_by_loops(x: Tensor, y: Tensor, window: int, sigma: float) -> float:
    """Of one image of one channel, its border mirrored."""
    r = window // 2
    at = torch.arange(-r, r + 1).double()
    weights = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = [torch.nn.functional.pad(image[None, None].double(), (r,) * 4, mode="reflect")[0, 0] for image in (x, y)]
    found = []
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a, b = (image[i : i + window, j : j + window] for image in padded)
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            spread = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
            shared = (weights * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            found.append(light * (2 * shared + 0.03**2) / (spread + 0.03**2))
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(("size", "window", "sigma"), [(16, 11, 1.5), (11, 11, 1.5), (8, 7, 3 / 3.5), (4, 3, 1 / 3.5)])
def test_ssim_is_that_of_loops_over_the_window_that_fits(size: int, window: int, sigma: float) -> None:
    x, y = pair(2, size, channels=1)
    expected = [ssim_by_loops(a[0], b[0], window, sigma) for a, b in zip(x, y, strict=True)]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [3, 8, 16])
def test_ssim_is_symmetric_independent_of_the_batch_and_one_for_equal_images(size: int) -> None:
    x, y = pair(3, size)
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    torch.testing.assert_close(ssim(x, y), torch.cat([ssim(x[i : i + 1], y[i : i + 1]) for i in range(3)]))
    torch.testing.assert_close(ssim(x, x), torch.ones(3))


def test_images_without_a_window_have_no_ssim() -> None:
    with pytest.raises(UnavailableError, match="images with a side of 2 pixels"):
        ssim(*pair(1, 2))


@pytest.fixture(params=get_args(LpipsNet))
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LpipsNet, Path]:
    """Weights as torchvision publishes them, of the layers that LPIPS uses."""
    torch.manual_seed(0)
    features = getattr(torchvision.models, _BACKBONES[request.param])().features
    weights = {f"features.{name}": weight for name, weight in features.state_dict().items()}
    torch.save(weights, tmp_path / "backbone.pth")
    return request.param, tmp_path / "backbone.pth"


def test_lpips_with_a_local_backbone(backbone: tuple[LpipsNet, Path]) -> None:
    net, path = backbone
    network = lpips_network(net, path)
    stored = torch.load(path, weights_only=True)
    loaded = list(network.net.parameters())  # type: ignore[union-attr]
    assert len(loaded) == len(stored)
    assert all(any(torch.equal(weight, other) for other in stored.values()) for weight in loaded)

    smallest = LPIPS_SMALLEST[net]
    x, y = pair(2, smallest)
    found = lpips(network, x, y)
    assert (found > 0).all()
    torch.testing.assert_close(found, lpips(network, y, x))
    torch.testing.assert_close(found[1:], lpips(network, x[1:], y[1:]))
    assert lpips(network, x, x).tolist() == [0, 0]
    small = pair(2, smallest - 1)
    with pytest.raises(
        UnavailableError, match=f"of {smallest - 1} pixels; LPIPS with '{net}' needs at least {smallest}"
    ):
        lpips(network, *small)
    with pytest.raises(RuntimeError):
        network(*small)


def test_backbones_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UnavailableError, match=r"locally and cannot be downloaded \(URLError: .*pass a local file"):
        lpips_network("squeeze")
    with pytest.raises(ConfigurationError, match="does not exist"):
        lpips_network("squeeze", tmp_path / "none.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of the backbone 'squeeze'"):
        lpips_network("squeeze", tmp_path / "other.pth")
    with pytest.raises(ConfigurationError, match="expected one of alex, vgg, squeeze"):
        lpips_network("resnet")  # type: ignore[arg-type]


def test_clip_score_is_the_cosine_and_never_negative() -> None:
    model, processor = clip_model(lambda: (TinyClip(), tiny_processor))
    images = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])[..., None, None].expand(-1, -1, 4, 4)
    prompts = ["zaz", "zaa"]
    a, b = images[0, :, 0, 0] - 0.5, torch.tensor([13.0, -12.0, 13.0])
    found = clip_scores(model, processor, images, prompts)
    assert found.tolist() == pytest.approx([100 * float(a @ b / a.norm() / b.norm()), 0], abs=1e-3)
