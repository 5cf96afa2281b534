"""Image folders, and descriptions of folders for error messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from lightning_quant.errors import ConfigurationError


def listing(folder: Path) -> str:
    """Describe the contents of a folder.

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
    """Create a torchvision ImageFolder.

    Args:
        folder: Folder with one subfolder of images for each class.
        transform: Function of a PIL image that returns an item of the data set.

    Raises:
        ConfigurationError: There are no class folders, or one of them contains no image.

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
