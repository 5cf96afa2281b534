"""A pipeline with a quantized denoiser is a folder that opens with one call and generates the same images."""

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.artifacts import quantized, weights
from helpers.diffusion import Kind, tiny_inputs, tiny_pipeline_folder, tiny_unet
from lightning_quant.accuquant.pipelines import DiffusionModel, load_float_pipeline
from lightning_quant.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from lightning_quant.export.pipeline import load_quantized_model, load_quantized_pipeline, save_quantized_pipeline
from lightning_quant.nn import swap, swap_attention
from lightning_quant.nn.attention import swapped_attentions
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.nn.timesteps import watch_timesteps
from lightning_quant.quantizers import FixedQuantizer, TimestepQuantizer

# Untyped, as it is in parts.
diffusers: Any = import_module("diffusers")
OBJECTS: list[Kind] = ["ddpm", "ddim", "ldm", "ldm_class", "dit"]
KINDS: list[Kind] = [*OBJECTS, "sd"]
NAMES = {"dit": "transformer"}


def softmax() -> FixedQuantizer:
    quantizer = FixedQuantizer(8, symmetric=False)
    quantizer.initialize(torch.rand(100))
    return quantizer


def by_timestep() -> TimestepQuantizer:
    """Coarser late, so that a group that is not found is seen."""
    quantizer = TimestepQuantizer(6, starts=(999, 500))
    quantizer.set_range(torch.tensor([[-3.0], [-9.0]]), torch.tensor([[3.0], [9.0]]))
    return quantizer


def quantize(network: nn.Module) -> nn.Module:
    for name, module in list(network.named_modules()):
        if type(module).__name__ == "Attention":
            swap_attention(module, softmax_quantizer=softmax())
        elif isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith("conv_out"):
            swap(module, by_timestep(), weights(module))
    watch_timesteps(network)
    return network


@torch.no_grad()
def sample(model: DiffusionModel, steps: int = 3) -> Tensor:
    """The images of a few steps."""
    x, conditioning = tiny_inputs(model.network)
    denoiser = model.denoiser(model.guidance)
    model.scheduler.set_timesteps(steps)
    for t in model.scheduler.timesteps:
        generator = {"generator": torch.manual_seed(1)} if model.pipeline_class == "DDPMPipeline" else {}
        x = model.scheduler.step(denoiser(x, t, conditioning), t, x, **generator).prev_sample
    return model.images(x)


def images(pipeline: Any, kind: Kind) -> Tensor:
    """Of a pipeline object."""
    pipeline.set_progress_bar_config(disable=True)
    which = {"class_labels": [3, 7]} if kind in ("dit", "ldm_class") else {"batch_size": 2}
    found = pipeline(**which, num_inference_steps=3, output_type="np", generator=torch.manual_seed(0)).images
    return torch.from_numpy(found)


@pytest.mark.parametrize("kind", OBJECTS)
def test_the_opened_pipeline_is_of_diffusers_and_generates_the_same_bits(tmp_path: Path, kind: Kind) -> None:
    source = tiny_pipeline_folder(kind, tmp_path / "float")
    model = load_float_pipeline(source)
    before = sample(model)
    quantize(model.network)
    pipeline = load_quantized_pipeline(save_quantized_pipeline(model, tmp_path / "deep" / "quantized"))
    assert type(pipeline).__name__ == model.pipeline_class
    assert len(list(swapped_attentions(getattr(pipeline, NAMES.get(kind, "unet"))))) > 0
    found = images(pipeline, kind)
    pipeline.register_modules(**{NAMES.get(kind, "unet"): model.network})
    assert torch.equal(images(pipeline, kind), found)
    assert not torch.equal(sample(model), before)


def saved(kind: Kind, root: Path) -> Path:
    """A pipeline with a quantized denoiser."""
    model = load_float_pipeline(tiny_pipeline_folder(kind, root / "float"))
    quantize(model.network)
    return save_quantized_pipeline(model, root / "quantized")


@pytest.mark.parametrize("kind", [kind for kind in OBJECTS if kind != "ldm_class"])
def test_plain_diffusers_opens_it_where_the_class_was_imported(tmp_path: Path, kind: Kind) -> None:
    folder = saved(kind, tmp_path)
    import_module("lightning_quant.export.denoiser")
    plain, ours = diffusers.DiffusionPipeline.from_pretrained(folder), load_quantized_pipeline(folder)
    assert type(plain) is type(ours)
    assert torch.equal(images(plain, kind), images(ours, kind))


def test_plain_diffusers_says_what_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(diffusers.pipelines.pipeline_loading_utils, "_get_library_or_raise"):
        pytest.skip("this diffusers imports what a folder names")
    folder = saved("ddim", tmp_path)
    monkeypatch.delitem(sys.modules, "lightning_quant.export.denoiser", raising=False)
    with pytest.raises(ValueError, match=r"import lightning_quant\.export\.denoiser before calling"):
        diffusers.DiffusionPipeline.from_pretrained(folder)


def test_plain_diffusers_casts_it_and_leaves_no_argument_out(tmp_path: Path) -> None:
    denoiser, folder = import_module("lightning_quant.export.denoiser"), saved("ddim", tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert plain.unet.dtype == torch.bfloat16
    assert all(q.scale.dtype == torch.float32 for _, q in quantizers_of(plain.unet))
    with pytest.raises(ConfigurationError, match=r"device_map='balanced'.*pipeline\.to\(device\)"):
        denoiser.QuantizedDenoiser.from_pretrained(folder / "unet", device_map="balanced")


def test_a_folder_of_before_opens_as_well(tmp_path: Path) -> None:
    folder = saved("ddim", tmp_path)
    expected = images(load_quantized_pipeline(folder), "ddim")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert torch.equal(images(load_quantized_pipeline(folder), "ddim"), expected)
    with pytest.raises(ConfigurationError, match="holds a quantized denoiser"):
        load_float_pipeline(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_opened_model_generates_the_same_bits(tmp_path: Path, kind: Kind) -> None:
    source = tiny_pipeline_folder(kind, tmp_path / "float")
    model = load_float_pipeline(source)
    quantize(model.network)
    for given in ((model, None), (source, model.network)):
        found = load_quantized_model(save_quantized_pipeline(given[0], tmp_path / "quantized", given[1]))
        assert (found.kind, found.sample_shape, found.guidance) == (model.kind, model.sample_shape, model.guidance)
        assert type(found.scheduler) is type(model.scheduler)
        assert torch.equal(sample(found), sample(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_as_diffusers_has_it_but_for_the_denoiser(tmp_path: Path, kind: Kind) -> None:
    source = tiny_pipeline_folder(kind, tmp_path / "float")
    model = load_float_pipeline(source)
    quantize(model.network)
    folder, name = save_quantized_pipeline(model, tmp_path / "quantized"), NAMES.get(kind, "unet")
    indices = [json.loads((each / "model_index.json").read_text()) for each in (source, folder)]
    assert indices[1].pop(name) == ["lightning_quant.export.denoiser", "QuantizedDenoiser"]
    assert indices[0].pop(name)[0] == "diffusers"
    listed = indices[1].pop("_lightning_quant")["files"]
    assert indices[0] == indices[1]
    assert listed == sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in (folder / name).iterdir()} == {
        "model.safetensors",
        "quantization.json",
        "config.json",
    }
    configs = [json.loads((each / name / "config.json").read_text()) for each in (source, folder)]
    assert configs[0] == {key: value for key, value in configs[1].items() if key != "_name_or_path"}
    for component in model.components:
        for path in (source / component).iterdir():
            if path.suffix == ".safetensors":
                assert (folder / component / path.name).stat().st_size == path.stat().st_size
    floats = (source / name / "diffusion_pytorch_model.safetensors").stat().st_size
    assert (folder / name / "model.safetensors").stat().st_size < 0.8 * floats


@pytest.mark.skipif(find_spec("transformers") is None, reason="Stable Diffusion's pipeline")
def test_stable_diffusion_opens_as_a_pipeline(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("sd", tmp_path / "float"))
    quantize(model.network)
    pipeline = load_quantized_pipeline(save_quantized_pipeline(model, tmp_path / "quantized"))
    pipeline.set_progress_bar_config(disable=True)
    x, conditioning = tiny_inputs(model.network)
    arguments = {
        "latents": x,
        "prompt_embeds": conditioning["encoder_hidden_states"],
        "negative_prompt_embeds": conditioning["uncond_encoder_hidden_states"],
        "num_inference_steps": 3,
        "output_type": "pt",
    }
    found = pipeline(**arguments).images
    pipeline.register_modules(unet=model.network)
    assert torch.equal(pipeline(**arguments).images, found)


@pytest.mark.skipif(find_spec("transformers") is not None, reason="without transformers")
def test_a_pipeline_whose_library_is_missing_says_so(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("sd", tmp_path / "float"))
    quantize(model.network)
    folder = save_quantized_pipeline(model, tmp_path / "quantized")
    with pytest.raises(
        ConfigurationError, match=r"StableDiffusionPipeline needs a library(.|\n)*transformers(.|\n)*load_quantized_mo"
    ):
        load_quantized_pipeline(folder)


def test_what_was_not_loaded_is_copied(tmp_path: Path) -> None:
    source = tiny_pipeline_folder("sd", tmp_path / "float")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.json").write_text("{}")
    index = json.loads((source / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (source / "model_index.json").write_text(json.dumps(index))
    model = load_float_pipeline(source)
    quantize(model.network)
    folder = save_quantized_pipeline(model, tmp_path / "quantized")
    assert (folder / "tokenizer" / "vocab.json").read_text() == "{}"
    assert json.loads((folder / "model_index.json").read_text())["tokenizer"] == ["transformers", "CLIPTokenizer"]


def test_a_bare_denoiser_becomes_a_pipeline(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "net")
    model = load_float_pipeline(tmp_path / "net", scheduler=diffusers.DDIMScheduler(beta_end=0.01))
    quantize(model.network)
    pipeline = load_quantized_pipeline(save_quantized_pipeline(model, tmp_path / "quantized"))
    assert isinstance(pipeline, diffusers.DDIMPipeline)
    assert pipeline.scheduler.config.beta_end == 0.01


def test_components_can_be_given_in_place_of_the_folders(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm", tmp_path / "float"))
    quantize(model.network)
    folder, scheduler = save_quantized_pipeline(model, tmp_path / "quantized"), diffusers.DDIMScheduler(beta_end=0.01)
    assert load_quantized_pipeline(folder, scheduler=scheduler).scheduler.config.beta_end == 0.01
    assert load_quantized_model(folder, scheduler=scheduler).scheduler is scheduler


def test_a_folder_that_was_saved_before_is_replaced(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm", tmp_path / "float"))
    quantize(model.network)
    folder = save_quantized_pipeline(model, tmp_path / "quantized")
    with torch.no_grad():
        model.network.conv_out.weight.add_(1.0)  # type: ignore[union-attr, operator]
    assert not torch.equal(sample(load_quantized_model(folder)), sample(model))
    assert torch.equal(sample(load_quantized_model(save_quantized_pipeline(model, folder))), sample(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "quantized"]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm", tmp_path / "float"))
    quantize(model.network)
    folder, expected = save_quantized_pipeline(model, tmp_path / "quantized"), sample(model)

    def fail(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(model.scheduler, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_quantized_pipeline(model, folder)
    assert torch.equal(sample(load_quantized_model(folder)), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "quantized"]


# -- what cannot be saved or opened -----------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    source = tiny_pipeline_folder("ldm", tmp_path / "float")
    model = load_float_pipeline(source)
    quantize(model.network)
    with pytest.raises(ConfigurationError, match="which saving would overwrite: write a new or an empty folder"):
        save_quantized_pipeline(model, source)
    folder = save_quantized_pipeline(model, tmp_path / "quantized")
    for notes in ("notes.txt", "unet/notes.txt"):
        (folder / notes).write_text("mine")
        with pytest.raises(ConfigurationError, match=rf"contains {notes}, which saving would overwrite"):
            save_quantized_pipeline(model, folder)
        (folder / notes).unlink()
    save_quantized_pipeline(model, folder)


def test_a_pipeline_below_the_home_folder_is_opened_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_pipeline_folder("ddpm", tmp_path / "float")
    model = load_float_pipeline("~/float")
    quantize(model.network)
    assert save_quantized_pipeline(model, "~/quantized") == tmp_path / "quantized"
    assert torch.equal(sample(load_quantized_model("~/quantized")), sample(model))
    assert type(load_quantized_pipeline("~/quantized")).__name__ == "DDPMPipeline"


def test_a_float_denoiser_is_not_saved(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm", tmp_path / "float"))
    with pytest.raises(UnsupportedModelError, match="UNet2DModel is not quantized"):
        save_quantized_pipeline(model, tmp_path / "quantized")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize("opener", [load_quantized_pipeline, load_quantized_model])
def test_a_float_pipeline_is_not_opened(tmp_path: Path, opener: Any) -> None:
    folder = tiny_pipeline_folder("ldm", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"its denoiser is not quantized: .* diffusers\.LDMPipeline\.from_pretrained"
    ):
        opener(folder)
    with pytest.raises(CheckpointError, match=r"has no model_index\.json: give a folder that save_quantized_pipeline"):
        opener(folder / "unet")


def test_a_quantized_folder_is_not_loaded_as_float(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm", tmp_path / "float"))
    quantize(model.network)
    with pytest.raises(
        ConfigurationError, match=r"holds a quantized denoiser: write lightning_quant\.load_quantized_pipeline\("
    ):
        load_float_pipeline(save_quantized_pipeline(model, tmp_path / "quantized"))


def test_a_denoiser_that_was_changed_is_not_opened(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm", tmp_path / "float"))
    quantized(model.network)
    folder = save_quantized_pipeline(model, tmp_path / "quantized")
    path = folder / "unet" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is truncated or changed"):
        load_quantized_pipeline(folder)
