"""All measures together: what must not change them, several ranks, what is missing and what is refused."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.processes import on_ranks
from helpers.tiny_clip import TinyClip, tiny_processor
from lightning_quant.errors import ConfigurationError
from lightning_quant.metrics import GenerationMetrics

IMAGES = 24
PROMPTS = [f"{a}{b}m a digit" for a in "abcdwxyz" for b in "anz"]


class Classifier(nn.Module):
    """Random features of images of any size, and logits of them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.features(images)
        return found, 20 * self.head(found)


def metrics_of(**options: Any) -> GenerationMetrics:
    chosen: dict[str, Any] = {"features": Classifier(), "lpips_net": None, "clip": lambda: (TinyClip(), tiny_processor)}
    return GenerationMetrics(**{**chosen, **options})


def three_sets() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    float_images, real = torch.rand(2, IMAGES, 1, 8, 8, generator=random) * torch.rand(
        2, IMAGES, 1, 1, 1, generator=random
    )
    noise = 0.1 * torch.randn(float_images.shape, generator=random)
    return (float_images + noise).clamp(0, 1), float_images, real.sqrt()


def fed(batches: list[Tensor], metrics: GenerationMetrics, ids: bool = False) -> GenerationMetrics:
    """With the images of each batch of indices."""
    quantized, float_images, real = three_sets()
    for batch in batches:
        metrics.update(quantized[batch], float_images[batch], None, [PROMPTS[i] for i in batch], batch if ids else None)
        metrics.update_real(real[batch], batch if ids else None)
    return metrics


def whole() -> dict[str, float]:
    return fed([torch.arange(IMAGES)], metrics_of(kid_subset_size=10)).compute()


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_every_measure_that_a_classifier_allows_is_there_and_tells_the_sets_apart() -> None:
    found = whole()
    assert found.keys() == {"FID", "IS", "KID", "CLIP", "FID2FP32", "PSNR", "SSIM"}
    assert 0 < found["FID2FP32"] < found["FID"]
    assert 1 < found["IS"] < 4
    assert 15 < found["PSNR"] < 25


def test_equal_images_are_at_no_distance() -> None:
    _, images, _ = three_sets()
    metrics = metrics_of()
    metrics.update(images, images)
    found = metrics.compute()
    assert found["PSNR"] == 100
    assert found["SSIM"] == pytest.approx(1)
    assert found["FID2FP32"] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, IMAGES])
def test_neither_order_nor_batches_change_a_number(ids: bool, batch_size: int) -> None:
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(batch_size))
    close(fed(list(order.split(batch_size)), metrics_of(kid_subset_size=10), ids).compute(), expected(ids))


def expected(ids: bool) -> dict[str, float]:
    """Ids give the images another order than their values do, and subsets are drawn by order."""
    return fed([torch.arange(IMAGES)], metrics_of(kid_subset_size=10), ids).compute()


def test_an_image_that_comes_twice_counts_once_where_ids_are_given() -> None:
    twice = [torch.arange(IMAGES), torch.tensor([3, 3, 7])]
    close(fed(twice, metrics_of(kid_subset_size=10), ids=True).compute(), expected(ids=True))
    assert fed(twice, metrics_of()).compute()["PSNR"] != pytest.approx(whole()["PSNR"], rel=1e-6)


Split = Callable[[int, int], Tensor]


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        (lambda rank, ranks: torch.arange(rank, IMAGES, ranks), False),
        (lambda rank, ranks: torch.arange(rank, IMAGES, ranks), True),
        # Uneven, with images that both have.
        (lambda rank, ranks: torch.arange(IMAGES)[: 17 if rank else 11] + (7 if rank else 0), True),
        # All on the last rank, none on the first.
        (lambda rank, ranks: torch.arange(IMAGES if rank else 0), False),
    ],
)
def test_several_ranks_give_what_one_gives(split: Split, ids: bool) -> None:
    def job(rank: int, ranks: int) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
        mine = split(rank, ranks)
        metrics = fed(list(mine.split(4)) if len(mine) else [], metrics_of(kid_subset_size=10), ids)
        return metrics.compute(), metrics.compute("float"), metrics.missing

    one = fed([torch.arange(IMAGES)], metrics_of(kid_subset_size=10), ids)
    first, *others = on_ranks(2, job)
    assert others == [first]
    close(first[0], one.compute())
    close(first[1], one.compute("float"))
    assert first[2] == one.missing


def test_what_one_rank_cannot_have_is_missing_on_all() -> None:
    def job(rank: int, ranks: int) -> tuple[dict[str, float], dict[str, str]]:
        metrics = metrics_of(features=Classifier() if rank else Classifier().features)
        found = fed([torch.arange(IMAGES)], metrics).compute()
        return found, metrics.missing

    first, second = on_ranks(2, job)
    assert first == second
    assert "IS" not in first[0]
    assert "has no class logits" in first[1]["IS"]


def test_an_error_comes_to_all_ranks() -> None:
    def job(rank: int, ranks: int) -> str:
        try:
            metrics_of().compute()
        except ConfigurationError as error:
            return str(error)
        return ""

    assert on_ranks(2, job) == ["No generated images: call update before compute."] * 2


def test_the_float_model_is_measured_as_if_it_were_the_quantized_one() -> None:
    _, float_images, real = three_sets()
    alone = metrics_of(kid_subset_size=10)
    alone.update(float_images, float_images, real, PROMPTS)
    numbers = alone.compute()
    found = fed([torch.arange(IMAGES)], metrics_of(kid_subset_size=10)).compute("float")
    assert found.keys() == {"FID", "IS", "KID", "CLIP"}
    # The order that subsets are drawn from is that of both models' images.
    for name in ("FID", "IS", "CLIP"):
        assert found[name] == pytest.approx(numbers[name], rel=1e-5)


def test_one_channel_is_repeated() -> None:
    quantized, float_images, real = three_sets()
    metrics = metrics_of(kid_subset_size=10)
    quantized, float_images, real = (images.repeat(1, 3, 1, 1) for images in (quantized, float_images, real))
    metrics.update(quantized, float_images, real, PROMPTS)
    close(metrics.compute(), whole())


def test_what_is_missing_is_named_once_with_its_reason() -> None:
    quantized, float_images, _ = three_sets()
    metrics = GenerationMetrics(nn.Flatten(), lpips_net=None)
    metrics.update(quantized, float_images, prompts=PROMPTS)
    with pytest.warns(UserWarning, match="Not computed") as told:
        metrics.compute()
    said = " ".join(str(warning.message) for warning in told)
    assert "FID (no real images: pass real_images to update, call update_real, or set real_statistics)" in said
    assert "IS (this feature network has no class logits" in said
    assert "sFID2FP32 (this feature network has no spatial features" in said
    assert "CLIP (prompts were given without a CLIP model: set clip" in said
    assert "24 images with 192 features are larger than over many" in said
    assert metrics.missing.keys() == {"FID", "sFID", "IS", "KID", "CLIP", "sFID2FP32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.compute()


def test_more_images_than_features_need_no_warning_of_their_number() -> None:
    metrics = fed([torch.arange(IMAGES)], metrics_of())
    with pytest.warns(UserWarning, match="Not computed: sFID") as told:
        metrics.compute()
    assert not any("images of" in str(warning.message) for warning in told)


def test_images_too_small_for_a_measure_lose_only_that() -> None:
    images = torch.rand(6, 3, 2, 2)
    metrics = GenerationMetrics(nn.Flatten(), lpips_net=None, kid_subset_size=10)
    metrics.update(images, images, images)
    assert metrics.compute().keys() == {"FID", "FID2FP32", "PSNR"}
    assert metrics.missing["SSIM"] == "images with a side of 2 pixels are smaller than the smallest window of 3"
    assert metrics.missing["KID"] == "6 images, but at least 10 are needed"


def test_reset_forgets_the_images() -> None:
    metrics = fed([torch.arange(4)], metrics_of(kid_subset_size=10))
    metrics.compute()
    metrics.reset()
    close(fed([torch.arange(IMAGES)], metrics).compute(), whole())


def good(count: int = 2) -> Tensor:
    return torch.rand(count, 1, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"quantized_images": good()[0]},
            r"quantized_images have shape \(1, 4, 4\) and dtype torch.float32: expected float images",
        ),
        ({"float_images": (good() * 255).byte()}, r"float_images have shape \(2, 1, 4, 4\) and dtype torch.uint8"),
        ({"quantized_images": good().repeat(1, 2, 1, 1)}, r"expected float images \(n, 1 or 3, H, W\)"),
        ({"quantized_images": good() * 2 - 1.5}, r"expected \[0, 1\]; convert a decoder's"),
        ({"quantized_images": good() * torch.nan}, r"from nan to nan: expected \[0, 1\]"),
        ({"float_images": good(3)}, r"\(2, 1, 4, 4\) and float_images \(3, 1, 4, 4\): expected the same shape"),
        ({"prompts": ["one"]}, "1 prompts for 2 images"),
        ({"ids": torch.arange(3)}, r"Rows for \[2, 3\] images in one batch: pass one id per image"),
        ({"real_images": good() + 1}, "real_images have values from"),
    ],
)
def test_arguments_that_cannot_be_right(arguments: dict[str, Any], message: str) -> None:
    metrics = GenerationMetrics(nn.Flatten(), lpips_net=None)
    with pytest.raises(ConfigurationError, match=message):
        metrics.update(**{"quantized_images": good(), "float_images": good(), **arguments})


def test_arguments_that_change_between_updates() -> None:
    metrics = metrics_of()
    metrics.update(good(), good(), ids=torch.arange(2))
    with pytest.raises(ConfigurationError, match="Only some batches have ids"):
        metrics.update(good(), good())


def test_subsets_of_one_image_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="kid_subset_size=1: expected at least 2"):
        GenerationMetrics(kid_subset_size=1)
