"""Folders of images, and words for messages where they are not laid out as expected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from lightning_quant.errors import ConfigurationError


def listing(folder: Path) -> str:
    """What a folder holds, in words.

    Example:
        >>> listing(Path("no-such-folder"))
        'no such folder'
    """
    if not folder.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(repr(name) for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "an empty folder"


def image_folder(folder: Path, transform: Callable[[Any], Any] | None = None) -> ImageFolder:
    """An ImageFolder of torchvision's.

    Args:
        folder: Holds one folder of images for each class.
        transform: From a PIL image to what the data set returns.

    Raises:
        ConfigurationError: If there are no class folders or one of them holds no image.

    Example:
        >>> image_folder(Path("no-such-folder"))
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: Cannot list images in 'no-such-folder': ...
    """
    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"Cannot list images in '{folder}': {error} Expected '{folder}/CLASS/IMAGE' for every class."
        ) from error
