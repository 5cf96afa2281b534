"""Grids of images: each pixel of the picture is the one that was given, and seeds stand in columns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imread
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.report.image_grids import draw_image_pairs


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def cells(figure: Figure) -> list[list[AxesImage]]:
    """The images from top to bottom, from left to right."""
    rows: dict[float, list[AxesImage]] = {}
    for image in figure.axes[0].images:
        rows.setdefault(image.get_extent()[3], []).append(image)
    return [sorted(rows[top], key=lambda image: image.get_extent()[0]) for top in sorted(rows)]


def gray(cell: AxesImage) -> Tensor:
    """What one cell shows, all channels alike."""
    channels = torch.as_tensor(np.asarray(cell.get_array()))
    assert torch.equal(channels, channels[..., :1].expand_as(channels))
    return channels[..., 0]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 16, 8), (3, 256, 256)])
def test_each_pixel_becomes_a_square_of_its_value(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    images = noise(2, *shape)
    figure = draw_image_pairs(images, {"4/8": images / 2}, path=tmp_path / "grid.png")
    picture = imread(tmp_path / "grid.png")[..., :3]
    for row, expected in zip(cells(figure), (images, images / 2), strict=True):
        for cell, image in zip(row, expected, strict=True):
            left, right, bottom, top = (round(end) for end in cell.get_extent())
            factor = (bottom - top) // shape[1]
            assert (bottom - top, right - left) == (factor * shape[1], factor * shape[2])
            assert max(bottom - top, right - left) >= 112
            found = picture[top:bottom, left:right].reshape(shape[1], factor, shape[2], factor, 3)
            wanted = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()[:, None, :, None]
            assert np.abs(found - wanted).max() <= 1 / 255


def test_large_images_are_shrunk() -> None:
    row, _ = cells(draw_image_pairs(noise(1, 3, 512, 256), {"x": noise(1, 3, 512, 256)}))
    left, right, bottom, top = row[0].get_extent()
    assert (bottom - top, right - left) == (256, 128)


def test_a_column_is_a_seed() -> None:
    images, other = noise(5, 1, 8, 8), noise(5, 1, 8, 8, seed=1)
    figure = draw_image_pairs(images, {"a": images, "b": other}, ids=torch.tensor([9, 4, 7, 1, 30]), columns=3)
    grid = cells(figure)
    assert [len(row) for row in grid] == [3, 3, 3, 2, 2, 2]
    for rows, block in ((grid[:3], slice(0, 3)), (grid[3:], slice(3, 5))):
        for row, source in zip(rows, (images, images, other), strict=True):
            assert torch.equal(torch.stack([gray(cell) for cell in row]), source[block, 0])
        assert len({tuple(cell.get_extent()[0] for cell in row) for row in rows}) == 1
    assert [text for text in texts(figure) if text.startswith("image ")] == [f"image {i}" for i in (9, 4, 7, 1, 30)]


def test_psnr_is_of_each_image() -> None:
    images = torch.full((3, 3, 8, 8), 0.5)
    changed = images + torch.tensor([0.0, 0.1, 0.01]).reshape(3, 1, 1, 1)
    found = texts(draw_image_pairs(images, {"x": changed}))
    assert [text for text in found if text == "equal" or text.endswith("dB")] == ["equal", "20.0 dB", "40.0 dB"]


def test_the_difference_is_amplified_and_named() -> None:
    images = torch.full((1, 1, 8, 8), 0.5)
    changed = images.clone()
    changed[0, 0, 0] = torch.linspace(0.1, 0.8, 8)
    figure = draw_image_pairs(images, {"x": changed}, amplify=4)
    difference = gray(cells(figure)[2][0])
    torch.testing.assert_close(difference, ((changed - images).abs() * 4).clamp(max=1)[0, 0])
    assert "|difference| x4" in texts(figure)


def test_bytes_are_images_too() -> None:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 1, 2, 2)
    drawn, _ = cells(draw_image_pairs(images, {"x": images}))
    torch.testing.assert_close(gray(drawn[0]), torch.tensor([[0, 0.2], [1, 0.4]]))


def test_every_text_is_inside_the_picture(tmp_path: Path) -> None:
    name = "AccuQuant, identity, windows of 4 steps"
    figure = draw_image_pairs(noise(1, 1, 8, 8), {name: noise(1, 1, 8, 8)}, path=tmp_path / "grid.png", title="t" * 60)
    width, height = figure.bbox.width, figure.bbox.height
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


@pytest.mark.parametrize(
    ("float_images", "other", "message"),
    [
        (noise(2, 4, 8, 8), noise(2, 4, 8, 8), r"'float' have shape \(2, 4, 8, 8\).*Decode latents into images first"),
        (noise(0, 1, 8, 8), noise(0, 1, 8, 8), r"shape \(0, 1, 8, 8\)"),
        (
            noise(2, 1, 8, 8),
            noise(3, 1, 8, 8),
            r"'x' have shape \(3, 1, 8, 8\), but the float images have \(2, 1, 8, 8\)",
        ),
        (
            noise(2, 1, 8, 8),
            -torch.ones(2, 1, 8, 8),
            r"values from -1 to -1: expected 0 to 1. Write \(\(images \+ 1\) / 2\)",
        ),
        (noise(2, 1, 8, 8), torch.full((2, 1, 8, 8), torch.nan), "values from nan to nan"),
    ],
)
def test_what_is_no_image_is_an_error(tmp_path: Path, float_images: Tensor, other: Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        draw_image_pairs(float_images, {"x": other}, path=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_what_does_not_fit_is_an_error() -> None:
    images = noise(2, 1, 8, 8)
    with pytest.raises(ConfigurationError, match="0 methods in 8 columns"):
        draw_image_pairs(images, {})
    with pytest.raises(ConfigurationError, match="1 methods in 0 columns"):
        draw_image_pairs(images, {"x": images}, columns=0)
    with pytest.raises(ConfigurationError, match="3 ids for 2 images"):
        draw_image_pairs(images, {"x": images}, ids=[1, 2, 3])
