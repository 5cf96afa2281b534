"""What is not saved, and that nothing that was changed is loaded."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.artifacts import mlp, quantized
from lightning_quant import load_quantized, save_quantized
from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError, UnsupportedModelError
from lightning_quant.export.folder import description_digest
from lightning_quant.nn import swap
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.quantizers import FixedQuantizer


def broken(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another description, under a hash that fits it."""
    path = folder / "quantization.json"
    content = json.loads(path.read_text())
    change(content)
    content["description_sha256"] = description_digest(content)
    path.write_text(json.dumps(content))


# -- what is not written ---------------------------------------------------------------------------------------


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential is not quantized: calibrate it"):
        save_quantized(mlp(), tmp_path / "mlp")
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_never_calibrated_is_not_saved(tmp_path: Path) -> None:
    model = mlp()
    swap(model[0], None, FixedQuantizer(4))
    with pytest.raises(QuantizationError, match="None of the 1 quantizers of Sequential has a range yet"):
        save_quantized(model, tmp_path / "mlp")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigurationError, match=r"contains thesis\.tex, which saving would overwrite: write a new"):
        save_quantized(quantized(mlp()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["~/keep", "$HOME/keep", "keep", "keep/", "./keep/.", "../home/keep", "link", "."])
def test_a_folder_is_the_same_by_whatever_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "keep").mkdir(parents=True)
    (home / "link").symlink_to("keep")
    (home / "keep" / "thesis.tex").write_text("years of work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "keep" if name == "." else home)
    with pytest.raises(ConfigurationError, match=r"home/keep contains thesis\.tex, which saving would overwrite"):
        save_quantized(quantized(mlp()), name)
    assert [path.name for path in (home / "keep").iterdir()] == ["thesis.tex"]
    assert sorted(path.name for path in home.iterdir()) == ["keep", "link"]


def test_the_home_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".profile").touch()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"contains \.profile|which cannot be replaced"):
            save_quantized(quantized(mlp()), "~")
        (tmp_path / ".profile").unlink(missing_ok=True)


def test_what_is_saved_below_the_home_folder_is_loaded_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model, x = quantized(mlp()), torch.randn(2, 9)
    assert save_quantized(model, "~/mlp") == tmp_path / "mlp"
    assert torch.equal(load_quantized("~/mlp", model=mlp())(x), model(x))


def test_files_of_these_names_that_others_wrote_are_left_alone(tmp_path: Path) -> None:
    for name in ("model.safetensors", "quantization.json"):
        (tmp_path / name).write_text('{"format": "another"}')
    with pytest.raises(ConfigurationError, match=r"contains model\.safetensors, quantization\.json"):
        save_quantized(quantized(mlp()), tmp_path)


def test_somebody_elses_safetensors_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ConfigurationError, match=r"contains model\.safetensors"):
        save_quantized(quantized(mlp()), tmp_path)


def test_an_empty_folder_and_one_of_ours_are_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "mlp"
    folder.mkdir()
    for bits in (4, 8):
        model = quantized(mlp(), bits)
        loaded = load_quantized(save_quantized(model, folder), model=mlp())
        assert loaded.get_submodule("0.weight_quantizer").bits == bits


def test_a_failure_in_writing_leaves_the_old_folder_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(mlp())
    folder = save_quantized(model, tmp_path / "mlp")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_quant.export.folder.file_hash", full)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(quantized(mlp(), 8), folder)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [folder]
    x = torch.randn(2, 9)
    assert torch.equal(load_quantized(folder, model=mlp())(x), model(x))


def test_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = nn.Sequential(quantized(mlp()), Odd(5, 5))
    with pytest.raises(ConfigurationError, match=r"1\._extra_state in the state dict is a dict"):
        save_quantized(model, tmp_path / "odd")


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    save_quantized(quantized(mlp()), tmp_path / "mlp")
    assert not list(tmp_path.iterdir())


# -- what is not loaded ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_quantized(quantized(mlp()), tmp_path / "mlp")


def test_a_network_that_cannot_be_built_has_to_be_given(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"write load_quantized\('.*mlp', model=network\) with the float network"):
        load_quantized(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "quantization.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}: give a folder that"):
        load_quantized(folder, model=mlp())


@pytest.mark.parametrize("name", ["model.safetensors", "quantization.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_file_that_was_cut_off_is_refused(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"{name} is truncated or changed .*: copy the folder again"):
        load_quantized(folder, model=mlp())


def test_a_single_changed_byte_is_refused(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="its sha256 is not the recorded one"):
        load_quantized(folder, model=mlp())


def test_a_changed_digit_of_the_description_is_refused(folder: Path) -> None:
    path = folder / "quantization.json"
    text = path.read_text()
    path.write_text(text.replace('"float32_bytes": ', '"float32_bytes": 1'))
    with pytest.raises(CheckpointError, match=r"json is changed \(its sha256 .*: copy the folder again"):
        load_quantized(folder, model=mlp())
    path.write_text(json.dumps(json.loads(text)))  # the same in other words
    load_quantized(folder, model=mlp())


def test_the_hash_of_a_description_is_that_of_what_is_read_again() -> None:
    # As texts, which keys of JSON are, they have another order.
    content = {"build": {"labels": {2: "b", 10: "c"}}, "description_sha256": "its own"}
    assert description_digest(content) == description_digest(json.loads(json.dumps(content)))


def test_a_description_that_is_nested_without_end_is_refused(folder: Path) -> None:
    (folder / "quantization.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"quantization\.json is truncated or changed"):
        load_quantized(folder, model=mlp())


def test_what_another_machine_left_is_named(folder: Path) -> None:
    (folder / "quantization.json").unlink()
    other = folder.with_name(f".{folder.name}.elsewhere.1.new")
    other.mkdir()
    with pytest.raises(CheckpointError, match=rf"(?s)has no quantization\.json.*Beside it lies {other.name}.*rename"):
        load_quantized(folder, model=mlp())


def test_an_unknown_version_says_which_package_wrote_it(folder: Path) -> None:
    broken(folder, lambda content: content.update(version=7, lightning_quant="9.1"))
    with pytest.raises(
        CheckpointError, match=r"version 7, this .* reads versions up to 2: load it with lightning_quant 9\.1"
    ):
        load_quantized(folder, model=mlp())


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("packed"),
        lambda content: content["packed"]["0.weight"].update(bits=5),
        lambda content: content["packed"]["0.weight"].update(shape=[7, 8]),
        lambda content: content["packed"]["0.weight"].update(dtype="load"),
        lambda content: content["packed"]["0.weight"].update(dtype="float3"),
        lambda content: content["modules"]["0"]["weight_quantizer"].__setitem__(0, 99),
        lambda content: content["modules"]["0"]["weight_quantizer"].__setitem__(1, 1),
        lambda content: content["modules"]["0"]["weight_quantizer"].__setitem__(1, 77),
        lambda content: content["modules"].pop("3"),
        lambda content: content["modules"].update({"9": {}}),
        lambda content: content["tied"].update({"a": "b"}),
    ],
)
def test_a_changed_description_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    broken(folder, change)
    with pytest.raises(CheckpointError):
        load_quantized(folder, model=mlp())


def tampered(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Other tensors, under a hash that fits them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    broken(folder, lambda content: content.update(sha256=digest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("1.bias"), r'Missing key.*"1\.bias"'),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r'Unexpected key.*"extra"'),
        (lambda tensors: tensors.update({"1.bias": torch.zeros(3)}), r"size mismatch for 1\.bias"),
    ],
)
def test_loading_is_strict(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    tampered(folder, change)
    with pytest.raises(CheckpointError, match=rf"(?s)does not fit this Sequential: .*{message}.*as model="):
        load_quantized(folder, model=mlp())


def test_another_network_than_the_saved_one_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantizes '0' and 1 other layers that VisionTransformer does not have"):
        load_quantized(folder, model=timm.create_model("vit_tiny_patch16_224", depth=1))


def test_a_moved_folder_loads(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    x = torch.randn(2, 9)
    loaded = load_quantized(tmp_path / "elsewhere", model=mlp())
    again = load_quantized(tmp_path / "elsewhere", model=mlp())
    assert torch.equal(loaded(x), again(x))
    assert all(quantizer.ready for _, quantizer in quantizers_of(loaded))
