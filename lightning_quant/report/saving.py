"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lightning_quant.utilities.paths import user_path


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file, whose ending decides the format; its folder is made where it is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(Figure(), folder + "/pictures/empty.svg")
        ...     [path.name for path in user_path(folder).rglob("*.svg")]
        ['empty.svg']
    """
    target = user_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
