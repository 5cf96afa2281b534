"""Embeddings of prompts: by the pipeline's own text encoder, or from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_quant.accuquant.denoiser import Conditioning
from lightning_quant.accuquant.pipelines import DiffusionModel
from lightning_quant.errors import CheckpointError, ConfigurationError

ROWS, EMPTY = "encoder_hidden_states", "uncond_encoder_hidden_states"


def embedded_prompts(path: str | Path, ids: Sequence[int], guided: bool = True) -> Conditioning:
    """Conditioning from a safetensors file of embeddings, taken one after the other by the images' numbers.

    Args:
        path: a file with ``encoder_hidden_states`` (prompts, L, D), and for guidance ``uncond_encoder_hidden_states``
            (1, L, D).
        ids: numbers of the images.
        guided: whether the unconditional branch is wanted.

    Raises:
        CheckpointError: no such file.
        ConfigurationError: tensors that are missing.
    """
    try:
        tensors = load_file(Path(path).expanduser())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"prompts={str(path)!r} is no safetensors file ({error}).") from error
    missing = [name for name in (ROWS, *([EMPTY] if guided else [])) if name not in tensors]
    if missing:
        raise ConfigurationError(
            f"{path} has {', '.join(sorted(tensors)) or 'nothing'} and no {' and no '.join(missing)}: write"
            f" {ROWS} (prompts, L, D), and for guidance {EMPTY} (1, L, D)."
        )
    rows = tensors[ROWS][[number % len(tensors[ROWS]) for number in ids]]
    return {ROWS: rows, EMPTY: tensors[EMPTY].expand_as(rows)} if guided else {ROWS: rows}


def text_encoder(model: DiffusionModel) -> Callable[[list[str]], Tensor]:
    """From prompts to embeddings (n, L, D), by the text encoder of the pipeline.

    Raises:
        ConfigurationError: a pipeline without one, or transformers is not installed.
    """
    tokenizer, encoder = model.components.get("tokenizer"), model.components.get("text_encoder")
    if (tokenizer is None or encoder is None) and model.folder is not None:
        tokenizer, encoder = _loaded(model.folder)
    if tokenizer is None or encoder is None:
        raise ConfigurationError(
            "The pipeline has no tokenizer and text_encoder: give prompts=FILE.safetensors with their embeddings."
        )

    def encode(prompts: list[str]) -> Tensor:
        length = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found: Tensor = encoder(tokens.input_ids.to(encoder.device))[0]
        return found.float().cpu()

    return encode


def _loaded(folder: Path) -> tuple[Any, Any]:
    if not (folder / "tokenizer").is_dir() or not (folder / "text_encoder").is_dir():
        return None, None
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ConfigurationError(
            "Prompts are encoded by transformers, which is not installed: pip install transformers, or give"
            " prompts=FILE.safetensors with embeddings."
        ) from error
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return tokenizer, transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
