"""Feature networks: the right layers, weights from files, and what cannot be had."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorInceptionV3, calculate_metrics
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError
from lightning_quant.metrics import GenerationMetrics, UnavailableError
from lightning_quant.metrics.features import feature_network, rows_of, to_bytes

TINY = "test_efficientnet"


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of random weights of its shape, with spatial features that are not all the same."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        torch.save(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.pth"
    model = timm.create_model(TINY).eval()
    torch.save(model.state_dict(), path)
    return model, path


def test_inception_gives_pooled_spatial_and_unbiased_logits(inception: Path) -> None:
    images = torch.rand(2, 3, 16, 16)
    rows = rows_of(feature_network("inception", inception), images)
    assert {name: tuple(row.shape) for name, row in rows.items()} == {
        "pooled": (2, 2048),
        "spatial": (2, 17 * 17 * 7),
        "logits": (2, 1008),
    }
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception))
    pooled, logits = theirs(to_bytes(images))
    torch.testing.assert_close(rows["pooled"], pooled)
    torch.testing.assert_close(rows["logits"], logits)

    x = interpolate_bilinear_2d_like_tensorflow1x(to_bytes(images).float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    for name, module in theirs.named_children():
        if name == "Mixed_6d":
            break
        x = module(x)
    spatial = module.branch1x1(x)
    assert tuple(spatial.shape) == (2, 192, 17, 17)
    torch.testing.assert_close(rows["spatial"], spatial[:, :7].flatten(1))


def test_all_measures_of_the_data_with_inception(inception: Path) -> None:
    x, y, real = torch.rand(3, 3, 1, 8, 8)
    metrics = GenerationMetrics("inception", inception, lpips_net=None)
    metrics.update(x, y, real)
    with pytest.warns(UserWarning, match="3 images with 2048 features"):
        found = metrics.compute()
    assert found.keys() == {"FID", "sFID", "IS", "KID", "FID2FP32", "sFID2FP32", "PSNR", "SSIM"}
    assert metrics.missing == {}


def test_timm_classifier_prepares_images_as_it_was_trained(classifier: tuple[Any, Path]) -> None:
    model, path = classifier
    images = torch.rand(2, 3, *model.default_cfg["input_size"][1:])
    rows = rows_of(feature_network(f"timm:{TINY}", path), images)
    mean, std = (torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    prepared = ((images * 255).round() / 255 - mean) / std
    torch.testing.assert_close(rows["logits"], model(prepared), atol=1e-5, rtol=1e-4)
    pooled = model.forward_head(model.forward_features(prepared), pre_logits=True)
    torch.testing.assert_close(rows["pooled"], pooled, atol=1e-5, rtol=1e-4)


class _Bytes(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = to_bytes(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_numbers_are_those_of_torch_fidelity_run_on_its_own(classifier: tuple[Any, Path]) -> None:
    _, path = classifier
    x, y, real = torch.rand(3, 120, 3, 8, 8) * torch.tensor([1.0, 0.9, 0.8]).view(3, 1, 1, 1, 1)
    metrics = GenerationMetrics(f"timm:{TINY}", path, lpips_net=None)
    for i in range(0, 120, 50):
        metrics.update(x[i : i + 50], y[i : i + 50], ids=torch.arange(120)[i : i + 50])
    metrics.update_real(real)
    found = metrics.compute()
    options: dict[str, Any] = {
        "feature_extractor": f"timm:{TINY}",
        "feature_extractor_weights_path": str(path),
        "cuda": False,
        "save_cpu_ram": True,
        "cache": False,
        "verbose": False,
        "batch_size": 60,
    }
    to_real = calculate_metrics(
        input1=_Bytes(x), input2=_Bytes(real), fid=True, isc=True, kid=True, kid_subset_size=120, **options
    )
    to_float = calculate_metrics(input1=_Bytes(x), input2=_Bytes(y), fid=True, **options)
    assert found["FID"] == pytest.approx(to_real["frechet_inception_distance"], rel=1e-3)
    assert found["IS"] == pytest.approx(to_real["inception_score_mean"], rel=1e-4)
    # Their kernels are of about 1, in float32.
    assert found["KID"] == pytest.approx(to_real["kernel_inception_distance_mean"], abs=1e-6)
    assert found["FID2FP32"] == pytest.approx(to_float["frechet_inception_distance"], rel=1e-3)


def test_a_module_is_copied_and_left_as_it_is() -> None:
    linear = nn.Linear(12, 4)
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), linear)
    network = feature_network(module)
    images = torch.rand(3, 3, 2, 2)
    before = rows_of(network, images)["pooled"]
    torch.testing.assert_close(before, linear(images.flatten(1)).detach())
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        linear.weight.zero_()
    torch.testing.assert_close(rows_of(network, images)["pooled"], before)


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1), images.mean((2, 3))


def test_a_module_may_give_logits_besides() -> None:
    images = torch.rand(3, 3, 2, 2)
    assert rows_of(feature_network(Pair()), images)["logits"].equal(images.mean((2, 3)))


def test_features_are_float32_under_autocast() -> None:
    network = feature_network(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    images = torch.rand(3, 3, 2, 2)
    before = rows_of(network, images)["pooled"]
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images)["pooled"].dtype is torch.bfloat16
        assert rows_of(network, images)["pooled"].equal(before)


def test_modules_whose_output_is_no_row_of_numbers() -> None:
    with pytest.raises(
        ConfigurationError, match=r"Identity returned pooled of shape \(2, 3, 4, 4\) for 2 images, but expected \(2, D"
    ):
        rows_of(feature_network(nn.Identity()), torch.rand(2, 3, 4, 4))
    blown = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    nn.init.constant_(blown[1].weight, torch.inf)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="pooled features of an image are not finite"):
        rows_of(feature_network(blown), torch.rand(2, 3, 4, 4))


def test_names_and_files_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="'resnet' is not a registered feature extractor: write one of 'inception'"
    ):
        feature_network("resnet")
    with pytest.raises(ConfigurationError, match=r"timm has no such model; timm.list_models\(\) lists them"):
        feature_network("timm:resnet51x")
    with pytest.raises(ConfigurationError, match=r"file '.*none.pth' does not exist"):
        feature_network("inception", tmp_path / "none.pth")
    with pytest.raises(
        ConfigurationError, match="cannot be combined with a module, Flatten: load the weights into the"
    ):
        feature_network(nn.Flatten(), tmp_path)


def test_a_file_of_another_network(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of features 'timm:test_efficientnet'"):
        feature_network(f"timm:{TINY}", tmp_path / "other.pth")


def test_weights_that_cannot_be_fetched_cost_only_what_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def offline(*args: Any, **kwargs: Any) -> None:
        tries.append(args)
        raise URLError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    with pytest.raises(
        UnavailableError, match=r"weights of features 'inception-v3-compat' are not available locally .*URLError"
    ):
        feature_network("inception")
    tries.clear()
    metrics = GenerationMetrics(lpips_net=None)
    images = torch.rand(4, 3, 8, 8)
    for batch in images.split(2):
        metrics.update(batch, batch, batch)
    with pytest.warns(
        UserWarning, match="Not computed: FID .the weights of features 'inception-v3-compat' are not available locally"
    ):
        assert metrics.compute().keys() == {"PSNR", "SSIM"}
    assert metrics.missing.keys() == {"FID", "sFID", "IS", "KID", "FID2FP32", "sFID2FP32"}
    assert len(tries) == 1
