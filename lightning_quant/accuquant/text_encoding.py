"""Embeddings of prompts for text-to-image denoisers, from a pipeline's text encoder or from a file."""

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
    """Return a function from n prompts to embeddings (n, L, D) on the CPU, as StableDiffusionPipeline computes them.

    The encoder is loaded here and not with the model, because it is large and embeddings are computed once.

    Args:
        model: Model with ``text_encoder`` and ``tokenizer`` among its components or in its folder.

    Raises:
        ConfigurationError: Model without a text encoder or tokenizer, or transformers is not installed.
        CheckpointError: Files that cannot be loaded.
    """
    tokenizer, encoder = (_component(model, name) for name in ("tokenizer", "text_encoder"))

    @torch.no_grad()
    def encode(prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        masked = getattr(encoder.config, "use_attention_mask", None)
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        hidden: Tensor = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
        return hidden.float().cpu()

    return encode


def _component(model: DiffusionModel, name: str) -> Any:
    if name in model.components:
        return model.components[name]
    components = {} if model.folder is None else read_folder(model.folder).components
    if name not in components:
        raise ConfigurationError(
            f"This {model.kind} model has no {name} to encode prompts with: give the folder of a complete pipeline, or"
            f" a safetensors file with {_HIDDEN} and {_EMPTY}, read_embeddings(file, ids)."
        )
    path, kind = components[name]
    try:
        component: Any = getattr(import_module("transformers"), kind).from_pretrained(path)
    except ImportError as error:
        raise ConfigurationError(
            f"The {name} in {path} is a {kind} of transformers, which is not installed: pip install transformers, or"
            f" give a safetensors file with {_HIDDEN} and {_EMPTY}, read_embeddings(file, ids)."
        ) from error
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not the folder of a {kind} that transformers can load: {error}") from error
    return component.eval().float() if name == "text_encoder" else component


def read_embeddings(path: str | Path, ids: Iterable[int] | Tensor) -> Conditioning:
    """Read the conditioning from a safetensors file of prompt embeddings, assigned in turn by the images' numbers.

    Args:
        path: File with the tensor ``encoder_hidden_states`` (prompts, L, D), and for guidance
            ``uncond_encoder_hidden_states`` (1, L, D) or (prompts, L, D).
        ids: Numbers of the images, (n,).

    Returns:
        Rows (n, L, D) by name.

    Raises:
        CheckpointError: Missing or truncated file.
        ConfigurationError: Tensors that are missing or have another shape.
    """
    file = user_path(path)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a safetensors file of embeddings ({error}).") from error
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
    conditional = {_HIDDEN: hidden[rows]}
    return conditional if empty is None else {**conditional, _EMPTY: empty.expand(len(hidden), -1, -1)[rows]}
