"""Picture of float and quantized images from the same seeds, side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from torch import Tensor

from lightning_quant.errors import ConfigurationError
from lightning_quant.metrics.similarity import HIGHEST_PSNR, psnr
from lightning_quant.report.plotting import GRAY, save_figure

_DPI = 100
# Longer side of a drawn image in pixels: small images are enlarged by an integer factor, large ones are shrunk.
_SMALLEST, _LARGEST = 112, 256
_GAP, _NOTE, _MARGIN = 6, 18, 12
_TITLE_SIZE, _LABEL_SIZE, _NOTE_SIZE = 11.0, 9.0, 7.5


def draw_image_pairs(
    float_images: Tensor,
    images: Mapping[str, Tensor],
    ids: Sequence[int] | Tensor | None = None,
    columns: int = 8,
    path: Path | None = None,
    title: str = "Images from the same seeds",
    amplify: float | None = None,
) -> Figure:
    """Draw a row of float images and a row per method, with one seed in each column.

    The PSNR to the float image is written below each image. If there are more images than columns, they continue in
    another block below.

    Args:
        float_images: Images (n, channels, height, width) with values from 0 to 1, or uint8; 1 or 3 channels.
        images: Images of the same shape, keyed by the name of the method.
        ids: Number of each image (n,), written above its column; None counts from 0.
        columns: Number of images in a row.
        path: File of the picture, whose suffix sets the format (.png, .svg, .pdf); None saves nothing.
        title: Title above the picture.
        amplify: Factor of the absolute difference to the float images, drawn in another row below each method; None
            draws no difference.

    Raises:
        ConfigurationError: No image, no method, shapes that differ, a number of channels other than 1 or 3, values
            outside 0 to 1, or a different number of ids and images.

    Example:
        >>> figure = draw_image_pairs(torch.full((2, 1, 8, 8), 0.5), {"4/8": torch.full((2, 1, 8, 8), 0.6)}, ids=[3, 7])
        >>> [text.get_text() for text in figure.axes[0].texts][:-1]
        ['image 3', 'image 7', 'float', '4/8', '20.0 dB', '20.0 dB']
    """
    reference = _checked("float", float_images, None)
    methods = {name: _checked(name, generated, reference) for name, generated in images.items()}
    if not methods or columns < 1:
        raise ConfigurationError(f"{len(methods)} methods in {columns} columns: expected at least one of each.")
    numbers = _ids(ids, len(reference))
    rows = list(_rows(reference, methods, amplify))
    height, width = _cell(*reference.shape[2:])
    label = _GAP + max(_width(_wrapped(name), _LABEL_SIZE) for name, _, _ in rows)
    blocks = [range(start, min(start + columns, len(reference))) for start in range(0, len(reference), columns)]
    used = len(blocks[0])
    top = _MARGIN + (24 if title else 0)
    # A line for the numbers of the images, then the images of each row, some with a note below.
    block_height = _NOTE + sum(height + (_GAP if notes is None else _NOTE) for _, _, notes in rows) + _GAP
    wide = max(label + used * (width + _GAP), _width(title, _TITLE_SIZE))
    figure, axes = _canvas(2 * _MARGIN + wide, top + len(blocks) * block_height + _GAP)
    for block in blocks:
        _draw_block(axes, (_MARGIN + label, top), (height, width), block, rows, numbers)
        top += block_height
    if title:
        axes.text(_MARGIN, _MARGIN, title, fontsize=_TITLE_SIZE, va="top")
    if path is not None:
        save_figure(figure, path)
    return figure


Row = tuple[str, Tensor, list[str] | None]


def _checked(name: str, images: Tensor, reference: Tensor | None) -> Tensor:
    """Check images and return them on the CPU, (n, channels, height, width), with values from 0 to 1."""
    values = images.detach().cpu()
    values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    if values.ndim != 4 or not values.numel() or values.shape[1] not in (1, 3):
        raise ConfigurationError(
            f"Images '{name}' have shape {tuple(images.shape)}: expected (n, 1 or 3, height, width). Decode latents"
            " into images first."
        )
    if reference is not None and values.shape != reference.shape:
        raise ConfigurationError(
            f"Images '{name}' have shape {tuple(images.shape)}, but the float images have {tuple(reference.shape)}:"
            " generate both from the same seeds."
        )
    low, high = float(values.min()), float(values.max())
    if not (low > -1e-3 and high < 1 + 1e-3):  # negated, so that NaN is refused too
        raise ConfigurationError(
            f"Images '{name}' have values from {low:.3g} to {high:.3g}: expected 0 to 1. Write"
            " ((images + 1) / 2).clamp(0, 1) to convert the outputs of a diffusion model."
        )
    return values.clamp(0, 1)


def _ids(ids: Sequence[int] | Tensor | None, count: int) -> list[int]:
    numbers = list(range(count)) if ids is None else [int(number) for number in ids]
    if len(numbers) != count:
        raise ConfigurationError(f"{len(numbers)} ids for {count} images: expected one per image.")
    return numbers


def _rows(reference: Tensor, methods: Mapping[str, Tensor], amplify: float | None) -> Iterator[Row]:
    """Yield name, images and notes of each row."""
    yield "float", reference, None
    for name, images in methods.items():
        yield name, images, _psnr(images, reference)
        if amplify is not None:
            yield f"|difference| x{amplify:g}", ((images - reference).abs() * amplify).clamp(0, 1), None


def _psnr(images: Tensor, reference: Tensor) -> list[str]:
    return ["equal" if value >= HIGHEST_PSNR else f"{value:.1f} dB" for value in psnr(images, reference).tolist()]


def _cell(height: int, width: int) -> tuple[int, int]:
    """Compute the height and width in pixels at which an image is drawn.

    Example:
        >>> _cell(8, 8), _cell(28, 28), _cell(32, 16), _cell(512, 256)
        ((112, 112), (112, 112), (128, 64), (256, 128))
    """
    longest = max(height, width)
    factor = math.ceil(_SMALLEST / longest) if longest <= _LARGEST else _LARGEST / longest
    return round(height * factor), max(1, round(width * factor))


def _wrapped(name: str) -> str:
    return textwrap.fill(name.replace("_", " "), 18)


def _width(text: str, size: float) -> int:
    """Measure the widest line of a text in pixels."""
    lines = [line for line in text.split("\n") if line.strip()]
    widest = max((TextPath((0, 0), line, size=size).get_extents().width for line in lines), default=0.0)
    return math.ceil(widest * _DPI / 72)


def _canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """Create a figure with one panel whose coordinates are pixels from the upper left corner."""
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    return figure, axes


def _draw_block(
    axes: Axes,
    corner: tuple[int, int],
    cell: tuple[int, int],
    block: Sequence[int],
    rows: Sequence[Row],
    numbers: Sequence[int],
) -> None:
    """Draw the images at the indices in ``block``, one row per method."""
    (x, y), (height, width) = corner, cell
    left = {place: x + i * (width + _GAP) for i, place in enumerate(block)}
    for place in block:
        _note(axes, left[place] + width / 2, y, f"image {numbers[place]}")
    y += _NOTE
    for name, images, notes in rows:
        axes.text(x - _GAP, y + height / 2, _wrapped(name), fontsize=_LABEL_SIZE, ha="right", va="center")
        for place in block:
            _picture(axes, images[place], (left[place], y), cell)
            if notes is not None:
                _note(axes, left[place] + width / 2, y + height, notes[place])
        y += height + (_GAP if notes is None else _NOTE)


def _picture(axes: Axes, image: Tensor, corner: tuple[int, int], cell: tuple[int, int]) -> None:
    (x, y), (height, width) = corner, cell
    axes.imshow(
        # With three channels gray keeps its 8 bits, which a color map would round again.
        image.expand(3, -1, -1).permute(1, 2, 0).numpy(),
        extent=(x, x + width, y + height, y),
        aspect="auto",
        interpolation="nearest" if image.shape[1] <= height else "antialiased",
    )


def _note(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y + 3, text, fontsize=_NOTE_SIZE, color=GRAY, ha="center", va="top")
