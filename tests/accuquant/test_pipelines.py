"""Rolling a loaded model out gives the images of its pipeline; what cannot be loaded is said with what to do."""

import json
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.diffusion import (
    CLASSES,
    TOKENS,
    WIDTH,
    Kind,
    tiny_condition_unet,
    tiny_dit,
    tiny_inputs,
    tiny_pipeline_folder,
    tiny_unet,
)
from lightning_quant.accuquant.class_conditional import ClassConditionalLDMPipeline
from lightning_quant.accuquant.decoding import to_images
from lightning_quant.accuquant.pipelines import DiffusionModel, load_float_pipeline
from lightning_quant.accuquant.samplers import sampler_of
from lightning_quant.accuquant.trajectories import generate
from lightning_quant.errors import CheckpointError, ConfigurationError, UnsupportedModelError

# Untyped, as it is in parts.
diffusers: Any = import_module("diffusers")
KINDS: list[Kind] = ["ddpm", "ddim", "ldm", "ldm_class", "sd", "dit"]
STEPS = 3
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="Stable Diffusion's pipeline")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@torch.no_grad()
def images(model: DiffusionModel, x: Tensor, conditioning: dict[str, Tensor], guidance: float | None) -> Tensor:
    """Of a roll-out with the steps of diffusers."""
    denoiser, scheduler = model.denoiser(guidance), model.scheduler
    scheduler.set_timesteps(STEPS)
    x = x * model.init_noise_sigma
    generator = {"generator": torch.manual_seed(1)} if type(scheduler).__name__ == "DDPMScheduler" else {}
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t, conditioning), t, x, **generator).prev_sample
    return model.images(x)


def noise(model: DiffusionModel, n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, *model.sample_shape, generator=torch.Generator().manual_seed(seed))


def in_pt(pipeline: Any, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(num_inference_steps=STEPS, output_type="np", **arguments).images
    return torch.from_numpy(found).permute(0, 3, 1, 2)


@pytest.mark.parametrize("guided", [True, False])
def test_the_samplers_take_the_steps_of_the_schedulers(tmp_path: Path, kind: Kind, guided: bool) -> None:
    model = load_float_pipeline(tiny_pipeline_folder(kind, tmp_path))
    if kind == "ddpm":
        model = replace(model, scheduler=diffusers.DPMSolverMultistepScheduler())
    guidance = model.guidance if guided else None
    x, conditioning = tiny_inputs(model.network)
    made = generate(model.denoiser(guidance), sampler_of(model.scheduler, STEPS), x, conditioning, range(2), seed=0)
    torch.testing.assert_close(
        model.images(made.states[-1]), images(model, x, conditioning, guidance), rtol=0, atol=1e-4
    )


def stable_diffusion(folder: Path) -> Any:
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, **absent)


# -- the images of the pipelines --------------------------------------------------------------------------------------


def test_images_of_ddim(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ddim", tmp_path)
    model = load_float_pipeline(folder)
    generator = torch.Generator().manual_seed(0)
    expected = in_pt(diffusers.DDIMPipeline.from_pretrained(folder), batch_size=2, generator=generator)
    assert torch.equal(images(model, noise(model), {}, None), expected)


def test_a_ddim_pipeline_samples_with_ddim_whatever_its_scheduler(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ddim", tmp_path, scheduler=diffusers.DDPMScheduler(beta_end=0.01))
    model = load_float_pipeline(folder)
    assert isinstance(model.scheduler, diffusers.DDIMScheduler)
    generator = torch.Generator().manual_seed(0)
    expected = in_pt(diffusers.DDIMPipeline.from_pretrained(folder), batch_size=2, generator=generator)
    assert torch.equal(images(model, noise(model), {}, None), expected)


def test_images_of_ddpm(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ddpm", tmp_path)
    model = load_float_pipeline(folder)
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler.set_timesteps(STEPS)
    generator = torch.manual_seed(1)
    x = torch.randn(2, *model.sample_shape, generator=generator)
    with torch.no_grad():
        found = x
        model.scheduler.set_timesteps(STEPS)
        for t in model.scheduler.timesteps:
            found = model.scheduler.step(model.denoiser()(found, t), t, found, generator=generator).prev_sample
    expected = in_pt(pipeline, batch_size=2, generator=torch.manual_seed(1))
    assert torch.equal(model.images(found), expected)


def test_images_of_an_unconditional_ldm(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ldm", tmp_path)
    model = load_float_pipeline(folder)
    generator = torch.Generator().manual_seed(0)
    expected = in_pt(diffusers.LDMPipeline.from_pretrained(folder), batch_size=2, generator=generator)
    found = images(model, noise(model), {}, None)
    assert found.shape == (2, 3, 16, 16)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("guidance", [4.0, None])
def test_images_of_dit(tmp_path: Path, guidance: float | None) -> None:
    folder = tiny_pipeline_folder("dit", tmp_path)
    model = load_float_pipeline(folder)
    generator = torch.Generator().manual_seed(0)
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    expected = in_pt(pipeline, class_labels=[207, 3], guidance_scale=guidance or 1.0, generator=generator)
    conditioning = model.label_conditioning(torch.tensor([207, 3]))
    assert torch.equal(images(model, noise(model), conditioning, guidance), expected)


@pytest.mark.parametrize("guidance", [3.0, None])
def test_images_of_a_class_conditional_ldm(tmp_path: Path, guidance: float | None) -> None:
    folder = tiny_pipeline_folder("ldm_class", tmp_path)
    model = load_float_pipeline(folder)
    generator = torch.Generator().manual_seed(0)
    pipeline = ClassConditionalLDMPipeline.from_pretrained(folder)
    expected = in_pt(pipeline, class_labels=[2, 9], guidance_scale=guidance or 1.0, generator=generator)
    conditioning = model.label_conditioning(torch.tensor([2, 9]))
    assert torch.equal(images(model, noise(model), conditioning, guidance), expected)


@needs_transformers
@pytest.mark.parametrize("guidance", [7.5, None])
def test_images_of_stable_diffusion(tmp_path: Path, guidance: float | None) -> None:
    folder = tiny_pipeline_folder("sd", tmp_path)
    model = load_float_pipeline(folder)
    _, conditioning = tiny_inputs(model.network)
    pipeline = stable_diffusion(folder)
    x = noise(model)
    expected = in_pt(
        pipeline,
        latents=x,
        prompt_embeds=conditioning["encoder_hidden_states"],
        negative_prompt_embeds=conditioning["uncond_encoder_hidden_states"],
        guidance_scale=guidance or 1.0,
    )
    # Its own way to [0, 1] rounds in another order.
    torch.testing.assert_close(images(model, x, conditioning, guidance), expected, rtol=0, atol=1e-6)


@needs_transformers
def test_the_old_settings_that_stable_diffusion_corrects_are_corrected(tmp_path: Path) -> None:
    old = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True, steps_offset=0)
    folder = tiny_pipeline_folder("sd", tmp_path, scheduler=old)
    model = load_float_pipeline(folder)
    theirs = stable_diffusion(folder).scheduler.config
    assert {key: model.scheduler.config[key] for key in ("steps_offset", "clip_sample")} == {
        key: theirs[key] for key in ("steps_offset", "clip_sample")
    }


def test_stable_diffusion_with_old_settings_needs_no_transformers(tmp_path: Path) -> None:
    old = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True, steps_offset=0)
    model = load_float_pipeline(tiny_pipeline_folder("sd", tmp_path, scheduler=old))
    assert (model.scheduler.config.steps_offset, model.scheduler.config.clip_sample) == (1, False)


# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_a_pipeline_object_is_taken_as_it_is(tmp_path: Path) -> None:
    pipeline = diffusers.LDMPipeline.from_pretrained(tiny_pipeline_folder("ldm", tmp_path))
    model = load_float_pipeline(pipeline)
    assert model.network is pipeline.unet
    assert model.scheduler is pipeline.scheduler
    assert model.kind == "ldm"
    assert model.components == {"vqvae": pipeline.vqvae}


def test_all_is_for_evaluation(tmp_path: Path, kind: Kind) -> None:
    model = load_float_pipeline(tiny_pipeline_folder(kind, tmp_path))
    assert not model.network.training
    assert not any(component.training for component in model.components.values())


def test_a_bare_denoiser_takes_a_scheduler_as_object_or_folder(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "net")
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, beta_end=0.01)
    scheduler.save_pretrained(tmp_path / "steps")
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    assert load_float_pipeline(tmp_path / "net", scheduler=scheduler).scheduler is scheduler
    for folder in ("steps", "pipeline"):
        model = load_float_pipeline(tmp_path / "net", scheduler=tmp_path / folder)
        assert isinstance(model.scheduler, diffusers.PNDMScheduler)
        assert model.scheduler.config.beta_end == 0.01
        assert (model.kind, model.decoder, model.folder) == ("ddpm", None, tmp_path / "net")


def test_a_bare_denoiser_with_its_scheduler_beside_it_or_below(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "scheduler"):
        tiny_unet().save_pretrained(tmp_path)
        diffusers.DDIMScheduler(beta_end=0.01).save_pretrained(place)
        assert load_float_pipeline(tmp_path).scheduler.config.beta_end == 0.01
        next(place.glob("scheduler_config.json")).unlink()


def test_folders_of_components_without_an_index(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ldm", tmp_path)
    expected = load_float_pipeline(folder)
    (folder / "model_index.json").unlink()
    found = load_float_pipeline(folder)
    assert (found.kind, found.pipeline_class) == ("ldm", "LDMPipeline")
    x = noise(found)
    assert torch.equal(images(found, x, {}, None), images(expected, x, {}, None))


def test_a_network_in_place_of_the_denoiser_is_not_loaded(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ldm", tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network = tiny_unet(seed=5)
    assert load_float_pipeline(folder, network=network).network is network


def test_a_class_table_from_a_file(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ldm_class", tmp_path / "pipeline")
    labels = torch.tensor([0, 4])
    expected = load_float_pipeline(folder)
    table = expected.components["class_embedding"].weight.detach()
    save_file({"cond_stage_model.embedding.weight": table}, tmp_path / "table.safetensors")
    (folder / "class_embedding" / "diffusion_pytorch_model.safetensors").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    del index["class_embedding"]
    (folder / "model_index.json").write_text(json.dumps(index))
    found = load_float_pipeline(folder, class_embedding=tmp_path / "table.safetensors")
    assert found.classes == CLASSES
    for name, rows in found.label_conditioning(labels).items():
        assert rows.shape == (2, 1, WIDTH)
        assert torch.equal(rows, expected.label_conditioning(labels)[name])


def test_the_dit_of_the_hub_has_its_old_class_name(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("dit", tmp_path)
    for path, text in (
        (folder / "model_index.json", '"DiTTransformer2DModel"'),
        (folder / "transformer" / "config.json", '"DiTTransformer2DModel"'),
    ):
        path.write_text(path.read_text().replace(text, '"Transformer2DModel"'))
    model = load_float_pipeline(folder)
    assert type(model.network) is diffusers.DiTTransformer2DModel
    assert model.kind == "dit"


def test_a_name_on_the_hub_is_left_to_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_pipeline_folder("ddim", tmp_path)
    asked: list[Any] = []

    def download(name: str, **arguments: Any) -> str:
        asked.append((name, arguments))
        return str(folder)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    model = load_float_pipeline("google/ddpm-cifar10-32", revision="main")
    assert asked == [("google/ddpm-cifar10-32", {"revision": "main"})]
    assert model.sample_shape == (3, 8, 8)


def test_classes_of_a_pixel_model() -> None:
    pipeline = diffusers.DDPMPipeline(tiny_unet(num_class_embeds=4), diffusers.DDPMScheduler())
    model = load_float_pipeline(pipeline)
    labels = torch.tensor([0, 3])
    assert model.classes == 4
    assert model.label_conditioning(labels) == {"class_labels": labels}
    assert model.denoiser()(noise(model), 3, {"class_labels": labels}).shape == (2, 3, 8, 8)


def test_states_are_decoded_some_at_a_time(tmp_path: Path, kind: Kind) -> None:
    model = load_float_pipeline(tiny_pipeline_folder(kind, tmp_path))
    x = noise(model, 3)
    whole = model.images(x)
    torch.testing.assert_close(model.images(x, batch=2), whole, rtol=0, atol=1e-5)
    assert 0 <= whole.min() <= whole.max() <= 1
    assert model.images(x[:0]).shape[0] == 0 if model.decoder is None else True


def test_gradients_flow_through_the_decoder(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("sd", tmp_path))
    x = noise(model).requires_grad_()
    assert model.decoder is not None
    (gradient,) = torch.autograd.grad(model.decoder(x).sum(), x)
    assert gradient.abs().max() > 0


# -- what cannot be loaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False])
def test_a_pipeline_without_scheduler(tmp_path: Path, listed: bool) -> None:
    folder = tiny_pipeline_folder("ddim", tmp_path)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    if not listed:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "scheduler"}))
    with pytest.raises(
        ConfigurationError, match=r"has no scheduler.*Add the folder scheduler/ .*scheduler=DDIMScheduler"
    ):
        load_float_pipeline(folder)
    assert load_float_pipeline(folder, scheduler=diffusers.DDIMScheduler()).kind == "ddpm"


def test_a_bare_denoiser_without_scheduler(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"scheduler_config.json. Add the folder scheduler/"):
        load_float_pipeline(tmp_path)


def test_a_folder_given_as_scheduler_without_one(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"scheduler='.*nowhere' has none"):
        load_float_pipeline(tmp_path, scheduler=tmp_path / "nowhere")


def test_a_scheduler_that_is_not_supported(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ldm", tmp_path, scheduler=diffusers.EulerDiscreteScheduler())
    with pytest.raises(UnsupportedModelError, match=r"EulerDiscreteScheduler; supported are DDIMScheduler, DDPMSched"):
        load_float_pipeline(folder)


def test_a_pipeline_that_is_not_supported(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("sd", tmp_path)
    text = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(text.replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(UnsupportedModelError, match=r"is a StableDiffusionXLPipeline; AccuQuant knows DDPMPipeline, "):
        load_float_pipeline(folder)


def test_a_denoiser_that_is_not_supported(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ddim", tmp_path)
    text = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(text.replace("UNet2DModel", "UNet3DConditionModel"))
    with pytest.raises(
        UnsupportedModelError, match=r"is a UNet3DConditionModel; supported are UNet2DModel, UNet2DCond"
    ):
        load_float_pipeline(folder)


def test_a_network_of_ones_own_is_no_part_of_a_pipeline(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ddim", tmp_path)
    with pytest.raises(UnsupportedModelError, match="The denoiser is a Linear; in a pipeline it has to be a UNet2DMod"):
        load_float_pipeline(folder, network=torch.nn.Linear(1, 1))


def test_an_autoencoder_that_is_not_supported(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("dit", tmp_path)
    text = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(text.replace("AutoencoderKL", "AutoencoderTiny"))
    with pytest.raises(UnsupportedModelError, match="is a AutoencoderTiny; supported are VQModel, AutoencoderKL"):
        load_float_pipeline(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"has no denoiser, found no component: give the folder of a diffusers"
    ):
        load_float_pipeline(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c/nowhere", "~/nowhere", Path("owner/name")])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name: str | Path) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no folder .*or a name on the hub, as"):
        load_float_pipeline(name)


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    with pytest.raises(ConfigurationError, match=r"'owner/name' was not found .* OSError: no connection"):
        load_float_pipeline("owner/name")


def test_an_object_that_is_no_pipeline() -> None:
    with pytest.raises(ConfigurationError, match="A Linear has no unet or transformer: give a folder"):
        load_float_pipeline(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"])
def test_files_that_are_cut_off(tmp_path: Path, file: str) -> None:
    path = tiny_pipeline_folder("ddim", tmp_path) / file
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"truncated or changed|that diffusers can load"):
        load_float_pipeline(tmp_path)


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    path = tiny_pipeline_folder("ddim", tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="is not the folder of a UNet2DModel that diffusers can load"):
        load_float_pipeline(tmp_path)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    (tiny_pipeline_folder("ddim", tmp_path) / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not the folder of a UNet2DModel that diffusers can load"):
        load_float_pipeline(tmp_path)


@pytest.mark.parametrize("labels", [[0, CLASSES], [-1]])
def test_labels_that_there_are_not(tmp_path: Path, labels: list[int]) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm_class", tmp_path))
    with pytest.raises(ConfigurationError, match=f"expected 0 .. {CLASSES - 1}"):
        model.label_conditioning(torch.tensor(labels))


def test_labels_of_a_model_without_classes(tmp_path: Path) -> None:
    model = load_float_pipeline(tiny_pipeline_folder("ldm", tmp_path))
    with pytest.raises(ConfigurationError, match="A ldm model takes no class labels, found 2"):
        model.label_conditioning(torch.tensor([1, 2]))


@pytest.mark.parametrize("shape", [(CLASSES, WIDTH + 1), (1, WIDTH), (WIDTH,)])
def test_a_class_table_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = tiny_pipeline_folder("ldm_class", tmp_path)
    with pytest.raises(ConfigurationError, match=rf"expected \(classes \+ 1, {WIDTH}\)"):
        load_float_pipeline(folder, class_embedding=torch.zeros(shape))


def test_a_class_table_among_others_or_in_another_file(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder("ldm_class", tmp_path / "pipeline")
    save_file({"a": torch.zeros(2, WIDTH), "b": torch.zeros(TOKENS)}, tmp_path / "two.safetensors")
    with pytest.raises(ConfigurationError, match=r"holds 2 tensors \(a, b\): expected one"):
        load_float_pipeline(folder, class_embedding=tmp_path / "two.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_float_pipeline(folder, class_embedding=tmp_path / "text.safetensors")


def test_a_denoiser_without_the_size_of_its_states() -> None:
    pipeline = diffusers.DDPMPipeline(tiny_unet(sample_size=None), diffusers.DDPMScheduler())
    with pytest.raises(ConfigurationError, match=r'sample_size=None: write .* "sample_size": 32'):
        load_float_pipeline(pipeline)


def test_shapes_that_are_not_square() -> None:
    pipeline = diffusers.DDPMPipeline(tiny_unet(sample_size=(8, 16)), diffusers.DDPMScheduler())
    assert load_float_pipeline(pipeline).sample_shape == (3, 8, 16)


def test_kinds_are_told_apart_by_what_is_there() -> None:
    dit = DiffusionModel(tiny_dit(), diffusers.DDIMScheduler(), "dit", (4, 8, 8))
    text = DiffusionModel(tiny_condition_unet(), diffusers.DDIMScheduler(), "sd", (4, 8, 8))
    assert (dit.classes, text.classes) == (1000, None)
    assert (dit.pipeline_class, text.pipeline_class) == ("DiTPipeline", "StableDiffusionPipeline")


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (diffusers.DDIMScheduler, "DDIMPipeline"),
        (partial(diffusers.PNDMScheduler, skip_prk_steps=True), "PNDMPipeline"),
        (diffusers.DDPMScheduler, "DDPMPipeline"),
        (diffusers.DPMSolverMultistepScheduler, "DDPMPipeline"),
    ],
)
def test_a_pipeline_that_samples_with_the_scheduler(scheduler: Any, expected: str) -> None:
    model = DiffusionModel(tiny_unet(), scheduler(), "ddpm", (3, 8, 8))
    assert model.pipeline_class == expected
    pipeline = getattr(diffusers, expected)(unet=model.network, scheduler=model.scheduler)
    assert in_pt(pipeline, batch_size=1).shape == (1, 3, 8, 8)


def test_images_are_cut_at_zero_and_one() -> None:
    assert to_images(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
