"""Class labels and prompts of generated images, determined by the images' numbers alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_quant.data.noise import drawn_number, numbers
from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.utilities.paths import user_path

if TYPE_CHECKING:
    from lightning_quant.accuquant.denoiser import Conditioning

# Function from n prompts to their embeddings (n, L, D).
Encode = Callable[[list[str]], Tensor]


def class_labels(
    ids: Iterable[int] | Tensor, classes: int | Sequence[int], seed: int = 0, balanced: bool = True
) -> Tensor:
    """Return a class label for each image.

    Args:
        ids: Numbers of the images, (n,).
        classes: Number of classes, or the classes to use.
        seed: Seed for drawing classes.
        balanced: Assign classes in turn, by the images' numbers; otherwise draw one for each image.

    Returns:
        Labels (n,) int64.

    Raises:
        ConfigurationError: No classes, or negative ones.

    Example:
        >>> class_labels(range(5), 3)
        tensor([0, 1, 2, 0, 1])
        >>> class_labels([7], [207, 360], balanced=False), class_labels([6, 7], [207, 360], balanced=False)[1:]
        (tensor([207]), tensor([207]))
    """
    labels = list(range(classes)) if isinstance(classes, int) else list(classes)
    if not labels or min(labels) < 0:
        raise ConfigurationError(f"classes={classes!r}: expected their number, as 1000, or a list, as [207, 360].")
    if balanced:
        return torch.tensor([labels[number % len(labels)] for number in numbers(ids)])
    return torch.tensor([labels[drawn_number(number, seed, len(labels))] for number in numbers(ids)])


def label_conditioning(labels: Tensor, unconditional: int | None = None) -> Conditioning:
    """Return the conditioning of a class-conditional denoiser.

    Args:
        labels: Class labels (n,) int64.
        unconditional: Label for no class, for guidance; None without guidance.

    Example:
        >>> label_conditioning(torch.tensor([3, 1]), unconditional=10)
        {'class_labels': tensor([3, 1]), 'uncond_class_labels': tensor([10, 10])}
    """
    if unconditional is None:
        return {"class_labels": labels}
    return {"class_labels": labels, "uncond_class_labels": torch.full_like(labels, unconditional)}


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a UTF-8 text file, one per line; empty lines and lines that start with ``#`` are skipped.

    Raises:
        ConfigurationError: Missing file, file without prompts, or a line that is not text; the message names the line.
    """
    file = user_path(path)
    if not file.is_file():
        raise ConfigurationError(f"There is no file of prompts {file}: write a text file with one prompt per line.")
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    prompts = [_line(file, number, line) for number, line in enumerate(lines, start=1)]
    prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    if not prompts:
        raise ConfigurationError(f"{file} has {len(lines)} lines and no prompt: write one prompt per line.")
    return prompts


def _line(file: Path, number: int, line: bytes) -> str:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{file}, line {number}, is not UTF-8 ({error.reason} at byte {error.start + 1}): save the file as UTF-8."
        ) from error
    control = next((letter for letter in text if unicodedata.category(letter) == "Cc" and letter != "\t"), None)
    if control is not None:
        raise ConfigurationError(
            f"{file}, line {number}, has the character {control!r}: expected UTF-8 text with one prompt per line."
        )
    return text


def prompt_conditioning(
    ids: Iterable[int] | Tensor,
    prompts: Sequence[str],
    encode: Encode,
    batch: int = 16,
    unconditional: str | None = "",
) -> Conditioning:
    """Return the conditioning of a text-to-image denoiser; prompts are assigned in turn, by the images' numbers.

    Args:
        ids: Numbers of the images, (n,).
        prompts: Prompts, as :func:`read_prompts` reads them.
        encode: Function from prompts to embeddings (n, L, D) of a common length L.
        batch: Number of prompts encoded at once.
        unconditional: Prompt of guidance's unconditional branch; None without guidance.

    Returns:
        Mapping with ``encoder_hidden_states`` (n, L, D) and, with guidance, ``uncond_encoder_hidden_states`` (n, L, D),
        on the CPU.

    Raises:
        ConfigurationError: No prompts, or embeddings of another shape.
        QuantizationError: Embeddings with NaN or infinities.

    Example:
        >>> length = lambda texts: torch.tensor([float(len(text)) for text in texts]).view(-1, 1, 1)
        >>> found = prompt_conditioning([0, 1, 2], ["a cat", "two dogs"], length)
        >>> found["encoder_hidden_states"].flatten()
        tensor([5., 8., 5.])
    """
    if not prompts or batch < 1:
        raise ConfigurationError(f"{len(prompts)} prompts in batches of {batch}: expected at least one of each.")
    assigned = [prompts[number % len(prompts)] for number in numbers(ids)]
    unique = list(dict.fromkeys(assigned))
    parts = [_encoded(encode, unique[first : first + batch]) for first in range(0, len(unique), batch)]
    _check_lengths(parts, unique, batch)
    rows = {prompt: row for row, prompt in enumerate(unique)}
    hidden = torch.cat(parts)[[rows[prompt] for prompt in assigned]]
    if unconditional is None:
        return {"encoder_hidden_states": hidden}
    empty = _encoded(encode, [unconditional])
    _check_lengths([hidden, empty], [assigned[0], unconditional], 1)
    return {"encoder_hidden_states": hidden, "uncond_encoder_hidden_states": empty.expand(len(hidden), -1, -1)}


def _encoded(encode: Encode, texts: list[str]) -> Tensor:
    with torch.no_grad():
        hidden: Any = encode(texts)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != len(texts):
        result = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ConfigurationError(
            f"encode returned {result} for {len(texts)} prompts: expected a tensor ({len(texts)}, L, D), like the text"
            " encoder's last_hidden_state."
        )
    if not bool(hidden.isfinite().all()):
        raise QuantizationError(
            f"The embeddings of prompts from {texts[0]!r} on have NaN or infinity: load the text encoder with"
            " torch_dtype=torch.float32."
        )
    embeddings: Tensor = hidden.detach().cpu()
    return embeddings


def _check_lengths(parts: list[Tensor], texts: list[str], batch: int) -> None:
    for index, part in enumerate(parts):
        if part.shape[1:] != parts[0].shape[1:]:
            raise ConfigurationError(
                f"encode returned embeddings {tuple(part.shape[1:])} from {texts[index * batch]!r} on and"
                f" {tuple(parts[0].shape[1:])} before: pad all prompts to one length, padding='max_length'."
            )
