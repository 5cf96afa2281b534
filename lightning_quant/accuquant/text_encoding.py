"""From prompts to what a text-to-image denoiser is given, by a pipeline's text encoder or from a file."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_quant.accuquant.conditions import Encode
from lightning_quant.accuquant.denoiser import Conditioning
from lightning_quant.accuquant.pipeline_folder import read_folder
from lightning_quant.accuquant.pipelines import DiffusionModel
from lightning_quant.data.noise import numbers
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.utilities.paths import user_path

_HIDDEN, _EMPTY = "encoder_hidden_states", "uncond_encoder_hidden_states"


def text_encoder(model: DiffusionModel) -> Encode:
    """A function from n prompts to their embeddings (n, L, D) on the CPU, as StableDiffusionPipeline computes them.

    The encoder is loaded here and not with the model: it is large, and embeddings are computed once.

    Args:
        model: with ``text_encoder`` and ``tokenizer`` among its components or in its folder.

    Raises:
        ConfigurationError: it has none, or transformers is not installed.
        CheckpointError: files that cannot be loaded.
    """
    tokenizer, encoder = (_component(model, name) for name in ("tokenizer", "text_encoder"))

    @torch.no_grad()
    def encode(prompts: list[str]) -> Tensor:
        found = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        masked = getattr(encoder.config, "use_attention_mask", None)
        mask = found.attention_mask.to(encoder.device) if masked else None
        hidden: Tensor = encoder(found.input_ids.to(encoder.device), attention_mask=mask)[0]
        return hidden.float().cpu()

    return encode


def _component(model: DiffusionModel, name: str) -> Any:
    if name in model.components:
        return model.components[name]
    known = {} if model.folder is None else read_folder(model.folder).components
    if name not in known:
        raise ConfigurationError(
            f"This {model.kind} model has no {name}, so that prompts cannot be encoded: give the folder of a whole"
            f" pipeline, or a safetensors file with {_HIDDEN} and {_EMPTY}, read_embeddings(file, ids)."
        )
    path, kind = known[name]
    try:
        found: Any = getattr(import_module("transformers"), kind).from_pretrained(path)
    except ImportError as error:
        raise ConfigurationError(
            f"The {name} in {path} is a {kind} of transformers, which is not installed: pip install transformers, or"
            f" give a safetensors file with {_HIDDEN} and {_EMPTY}, read_embeddings(file, ids)."
        ) from error
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not the folder of a {kind} that transformers can load: {error}") from error
    return found.eval().float() if name == "text_encoder" else found


def read_embeddings(path: str | Path, ids: Iterable[int] | Tensor) -> Conditioning:
    """Conditioning from embeddings of prompts in a safetensors file, taken one after the other by the images' numbers.

    Args:
        path: with the tensor ``encoder_hidden_states`` (prompts, L, D), and for guidance beside it
            ``uncond_encoder_hidden_states`` (1, L, D) or (prompts, L, D).
        ids: (n,) numbers of the images.

    Returns:
        rows (n, L, D) by name.

    Raises:
        CheckpointError: no such file, or one that is cut off.
        ConfigurationError: tensors that are missing or of other shapes.
    """
    file = user_path(path)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is no safetensors file of embeddings ({error}).") from error
    hidden, empty = tensors.get(_HIDDEN), tensors.get(_EMPTY)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fits = empty is None or (
        hidden is not None and len(empty) in (1, len(hidden)) and empty.shape[1:] == hidden.shape[1:]
    )
    if hidden is None or hidden.dim() != 3 or not len(hidden) or not fits:
        raise ConfigurationError(
            f"{file} holds {shapes or 'nothing'}: expected {_HIDDEN} (prompts, L, D) and, for guidance, {_EMPTY}"
            " (1, L, D) or (prompts, L, D)."
        )
    rows = [number % len(hidden) for number in numbers(ids)]
    found = {_HIDDEN: hidden[rows]}
    return found if empty is None else {**found, _EMPTY: empty.expand(len(hidden), -1, -1)[rows]}
