import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from lightning_quant.data import RandomCropFlip, TensorImages
from lightning_quant.errors import ConfigurationError


def _images(number: int, channels: int = 3, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(1, 256, (number, channels, size, size), generator=generator, dtype=torch.uint8)


@given(padding=st.integers(0, 3), seed=st.integers(0, 100))
def test_every_result_is_a_crop_of_its_own_padded_image_or_its_mirror(padding: int, seed: int) -> None:
    images = _images(5)
    torch.manual_seed(seed)
    augmented = RandomCropFlip(padding)(images)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    for index, result in enumerate(augmented):
        crops = [
            padded[index, :, top : top + 6, left : left + 6]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        assert any(torch.equal(result, crop) or torch.equal(result.flip(-1), crop) for crop in crops)


def test_all_offsets_and_both_directions_occur_about_equally_often() -> None:
    torch.manual_seed(0)
    one = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    one[0, 0, 1, 1] = 1
    places = RandomCropFlip(padding=1)(one.expand(9000, 1, 3, 3)).sum(0)[0]
    assert places.min() > 850
    assert places.max() < 1150
    corner = torch.tensor([[[[1, 0]]]], dtype=torch.uint8).expand(4000, 1, 1, 2)
    mirrored = RandomCropFlip(padding=0)(corner)[:, 0, 0, 1].sum().item()
    assert 1850 < mirrored < 2150


def test_the_same_seed_gives_the_same_epoch() -> None:
    dataset = TensorImages(_images(40), torch.arange(40), (0.5,) * 3, (0.2,) * 3, RandomCropFlip(2))

    def epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([images for images, _ in DataLoader(dataset, batch_size=16, shuffle=True)])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_batched_fetch_equals_fetching_one_by_one_and_the_formula() -> None:
    images, mean, std = _images(10), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    dataset = TensorImages(images, torch.arange(10), mean, std)
    together, labels = next(iter(DataLoader(dataset, batch_size=10)))
    expected = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(together.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(together, torch.stack([dataset[index][0] for index in range(10)]))
    assert labels.tolist() == list(range(10))
    assert labels.dtype == torch.int64


def test_a_subset_fetches_its_own_indices() -> None:
    dataset = TensorImages(_images(10), torch.arange(10), (0.5,) * 3, (0.5,) * 3)
    _, labels = next(iter(DataLoader(Subset(dataset, [7, 2, 5]), batch_size=3)))
    assert labels.tolist() == [7, 2, 5]


def test_fetching_leaves_the_stored_images_as_they_were() -> None:
    images = _images(4)
    before = images.clone()
    TensorImages(images, torch.arange(4), (0.5,) * 3, (0.5,) * 3, RandomCropFlip(2)).__getitems__([0, 1, 2, 3])
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("images", "labels", "mean", "found"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), (0.5,) * 3, "torch.float32 images"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2), (0.5,) * 3, r"images \(2, 4, 4\)"),
        (_images(2), torch.zeros(3), (0.5,) * 3, r"labels \(3,\)"),
        (_images(2), torch.zeros(2), (0.5,), "each of 3 channels, but found 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    images: torch.Tensor, labels: torch.Tensor, mean: tuple[float, ...], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=found):
        TensorImages(images, labels, mean, mean)


def test_negative_padding_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="padding >= 0, but found -1"):
        RandomCropFlip(-1)
