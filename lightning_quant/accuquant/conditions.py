"""What images are of: class labels and prompts, each image's by its number alone."""

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

# From n prompts to their embeddings (n, L, D).
Encode = Callable[[list[str]], Tensor]


def class_labels(
    ids: Iterable[int] | Tensor, classes: int | Sequence[int], seed: int = 0, balanced: bool = True
) -> Tensor:
    """A class for each image.

    Args:
        ids: (n,) numbers of the images.
        classes: how many there are, or which of them to take.
        seed: of the draw.
        balanced: one class after the other, by the images' numbers; else drawn for each image.

    Returns:
        (n,) int64.

    Raises:
        ConfigurationError: no classes.

    Example:
        >>> class_labels(range(5), 3)
        tensor([0, 1, 2, 0, 1])
        >>> class_labels([7], [207, 360], balanced=False), class_labels([6, 7], [207, 360], balanced=False)[1:]
        (tensor([207]), tensor([207]))
    """
    chosen = list(range(classes)) if isinstance(classes, int) else list(classes)
    if not chosen or min(chosen) < 0:
        raise ConfigurationError(f"classes={classes!r}: expected how many there are, as 1000, or which, as [207, 360].")
    if balanced:
        return torch.tensor([chosen[number % len(chosen)] for number in numbers(ids)])
    return torch.tensor([chosen[drawn_number(number, seed, len(chosen))] for number in numbers(ids)])


def label_conditioning(labels: Tensor, unconditional: int | None = None) -> Conditioning:
    """Conditioning of a class-conditional denoiser.

    Args:
        labels: (n,) int64.
        unconditional: the label of no class, where there is guidance.

    Example:
        >>> label_conditioning(torch.tensor([3, 1]), unconditional=10)
        {'class_labels': tensor([3, 1]), 'uncond_class_labels': tensor([10, 10])}
    """
    if unconditional is None:
        return {"class_labels": labels}
    return {"class_labels": labels, "uncond_class_labels": torch.full_like(labels, unconditional)}


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file in UTF-8, one a line; empty lines and those that start with ``#`` are left out.

    Raises:
        ConfigurationError: no such file, no prompts in it, or a line that is not text; names the line.
    """
    file = user_path(path)
    if not file.is_file():
        raise ConfigurationError(f"There is no file of prompts {file}: write a text file, one prompt a line.")
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    prompts = [_line(file, number, line) for number, line in enumerate(lines, start=1)]
    found = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    if not found:
        raise ConfigurationError(f"{file} has {len(lines)} lines and no prompt: write one prompt a line.")
    return found


def _line(file: Path, number: int, line: bytes) -> str:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{file}, line {number}, is not UTF-8 ({error.reason} at byte {error.start + 1}): save the file as UTF-8."
        ) from error
    wrong = next((letter for letter in text if unicodedata.category(letter) == "Cc" and letter != "\t"), None)
    if wrong is not None:
        raise ConfigurationError(
            f"{file}, line {number}, has the character {wrong!r}: expected text, one prompt a line, as UTF-8."
        )
    return text


def prompt_conditioning(
    ids: Iterable[int] | Tensor,
    prompts: Sequence[str],
    encode: Encode,
    batch: int = 16,
    unconditional: str | None = "",
) -> Conditioning:
    """Conditioning of a text-to-image denoiser; prompts are taken one after the other, by the images' numbers.

    Args:
        ids: (n,) numbers of the images.
        prompts: as :func:`read_prompts` reads them.
        encode: from prompts to embeddings (n, L, D), of one length L.
        batch: prompts at once.
        unconditional: the prompt of the unconditional branch of guidance, None without guidance.

    Returns:
        ``encoder_hidden_states`` (n, L, D), and beside it ``uncond_encoder_hidden_states``, both on the CPU.

    Raises:
        ConfigurationError: no prompts, or embeddings of other shapes.
        QuantizationError: embeddings with NaN or infinities.

    Example:
        >>> length = lambda texts: torch.tensor([float(len(text)) for text in texts]).view(-1, 1, 1)
        >>> found = prompt_conditioning([0, 1, 2], ["a cat", "two dogs"], length)
        >>> found["encoder_hidden_states"].flatten()
        tensor([5., 8., 5.])
    """
    if not prompts or batch < 1:
        raise ConfigurationError(f"{len(prompts)} prompts in batches of {batch}: expected at least one of each.")
    chosen = [prompts[number % len(prompts)] for number in numbers(ids)]
    different = list(dict.fromkeys(chosen))
    parts = [_encoded(encode, different[first : first + batch]) for first in range(0, len(different), batch)]
    _check_lengths(parts, different, batch)
    rows = {prompt: row for row, prompt in enumerate(different)}
    hidden = torch.cat(parts)[[rows[prompt] for prompt in chosen]]
    if unconditional is None:
        return {"encoder_hidden_states": hidden}
    empty = _encoded(encode, [unconditional])
    _check_lengths([hidden, empty], [chosen[0], unconditional], 1)
    return {"encoder_hidden_states": hidden, "uncond_encoder_hidden_states": empty.expand(len(hidden), -1, -1)}


def _encoded(encode: Encode, texts: list[str]) -> Tensor:
    with torch.no_grad():
        hidden: Any = encode(texts)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != len(texts):
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ConfigurationError(
            f"encode gave {found} for {len(texts)} prompts: expected a tensor ({len(texts)}, L, D), as the text"
            " encoder's last_hidden_state."
        )
    if not bool(hidden.isfinite().all()):
        raise QuantizationError(
            f"The embeddings of prompts from {texts[0]!r} on have NaN or infinities: load the text encoder with"
            " torch_dtype=torch.float32."
        )
    embeddings: Tensor = hidden.detach().cpu()
    return embeddings


def _check_lengths(parts: list[Tensor], texts: list[str], batch: int) -> None:
    for index, part in enumerate(parts):
        if part.shape[1:] != parts[0].shape[1:]:
            raise ConfigurationError(
                f"encode gave embeddings {tuple(part.shape[1:])} from {texts[index * batch]!r} on and"
                f" {tuple(parts[0].shape[1:])} before: pad all prompts to one length, padding='max_length'."
            )
