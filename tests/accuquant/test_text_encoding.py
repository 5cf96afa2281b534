"""Embeddings of prompts are those of the pipeline, or are read from a file by the images' numbers."""

import json
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.diffusion import TOKENS, WIDTH, tiny_condition_unet, tiny_pipeline_folder
from lightning_quant.accuquant.conditions import prompt_conditioning
from lightning_quant.accuquant.pipelines import DiffusionModel, load_float_pipeline
from lightning_quant.accuquant.text_encoding import read_embeddings, text_encoder
from lightning_quant.errors import CheckpointError, ConfigurationError

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="a text encoder")


def text_to_image(components: dict[str, Any], folder: Path | None = None) -> DiffusionModel:
    return DiffusionModel(tiny_condition_unet(), None, "sd", (4, 8, 8), components, 7.5, folder)


def tokens(prompts: list[str], max_length: int, **_: Any) -> Any:
    rows = [[ord(letter) for letter in prompt[:max_length].ljust(max_length)] for prompt in prompts]
    return SimpleNamespace(input_ids=torch.tensor(rows), attention_mask=torch.tensor(rows) != ord(" "))


tokens.model_max_length = TOKENS  # type: ignore[attr-defined]


class Encoder(nn.Module):
    device = torch.device("cpu")

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_attention_mask=masked)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        hidden = ids.double() if attention_mask is None else ids.double() * attention_mask
        return (hidden.unsqueeze(-1).expand(-1, -1, WIDTH),)


@pytest.mark.parametrize("masked", [True, False])
def test_prompts_are_padded_to_one_length_and_masked_where_the_encoder_says_so(masked: bool) -> None:
    encode = text_encoder(text_to_image({"tokenizer": tokens, "text_encoder": Encoder(masked)}))
    found = encode(["ab", "a long prompt"])
    assert found.shape == (2, TOKENS, WIDTH)
    assert found.dtype == torch.float32
    assert found[0, :, 0].tolist() == [97, 98, *([0.0 if masked else 32.0] * (TOKENS - 2))]


def transformers_pipeline(path: Path) -> Path:
    """Stable Diffusion with a tiny CLIP and a tokenizer of letters."""
    transformers: Any = import_module("transformers")
    folder = tiny_pipeline_folder("sd", path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (path / "words").mkdir()
    (path / "words" / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (path / "words" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path / "words", model_max_length=8)
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=len(names), max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
    )
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", type(tokenizer).__name__]
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@needs_transformers
def test_embeddings_are_those_of_stable_diffusion(tmp_path: Path) -> None:
    folder = transformers_pipeline(tmp_path)
    diffusers: Any = import_module("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    prompts = ["a cat", "dogs on a very long lawn"]
    cond, uncond = pipeline.encode_prompt(prompts, "cpu", 1, True)
    found = prompt_conditioning([0, 1], prompts, text_encoder(load_float_pipeline(folder)))
    assert torch.equal(found["encoder_hidden_states"], cond)
    torch.testing.assert_close(found["uncond_encoder_hidden_states"], uncond)
    assert (cond[0] - cond[1]).abs().max() > 1e-2


@pytest.mark.skipif(find_spec("transformers") is not None, reason="without transformers")
def test_a_text_encoder_without_transformers(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("sd", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "CLIPTokenizer"]}))
    with pytest.raises(ConfigurationError, match=r"pip install transformers, or give a safetensors file with"):
        text_encoder(load_float_pipeline(folder))


def test_a_model_without_text_encoder(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("sd", tmp_path))
    for each in (model, replace(model, folder=None)):
        with pytest.raises(
            ConfigurationError, match=r"has no tokenizer to encode prompts with: .* read_embeddings\(file, ids\)"
        ):
            text_encoder(each)


# -- from a file ------------------------------------------------------------------------------------------------------


def saved(path: Path, **tensors: Tensor) -> Path:
    save_file(tensors, path / "embeddings.safetensors")
    return path / "embeddings.safetensors"


def test_rows_are_taken_by_the_numbers_of_the_images(tmp_path: Path) -> None:
    hidden, empty = torch.randn(3, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    file = saved(tmp_path, encoder_hidden_states=hidden, uncond_encoder_hidden_states=empty)
    found = read_embeddings(file, [4, 0])
    assert torch.equal(found["encoder_hidden_states"], hidden[[1, 0]])
    assert torch.equal(found["uncond_encoder_hidden_states"], empty.expand(2, -1, -1))


def test_without_guidance_the_other_branch_may_be_missing(tmp_path: Path) -> None:
    assert list(read_embeddings(saved(tmp_path, encoder_hidden_states=torch.zeros(1, 2, 3)), [0])) == [
        "encoder_hidden_states"
    ]


@pytest.mark.parametrize(
    "tensors",
    [
        {"hidden": torch.zeros(1, 2, 3)},
        {"encoder_hidden_states": torch.zeros(2, 3)},
        {"encoder_hidden_states": torch.zeros(0, 2, 3)},
        {"encoder_hidden_states": torch.zeros(3, 2, 3), "uncond_encoder_hidden_states": torch.zeros(2, 2, 3)},
        {"encoder_hidden_states": torch.zeros(3, 2, 3), "uncond_encoder_hidden_states": torch.zeros(1, 5, 3)},
        {"uncond_encoder_hidden_states": torch.zeros(1, 5, 3)},
    ],
)
def test_other_shapes_are_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigurationError, match=r"holds \{.*expected encoder_hidden_states \(prompts, L, D\)"):
        read_embeddings(saved(tmp_path, **tensors), [0])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a safetensors file of embeddings"):
        read_embeddings(tmp_path / "nothing.safetensors", [0])
