"""Distances between sets of features against slow float64 oracles, and what must not change them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.metrics import UnavailableError
from lightning_quant.metrics.fidelity import frechet_distance, inception_score, kernel_distance, read_statistics


def features(count: int, width: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """As a ReLU leaves them, of directions that differ much in size."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=random) * torch.logspace(0, -2, width)
    return (mixed @ torch.randn(width, width, generator=torch.Generator().manual_seed(99)) + shift).relu()


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    found: np.ndarray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return found


def frechet_oracle(x: Tensor, y: Tensor) -> float:
    a, b = x.double().numpy(), y.double().numpy()
    first, second = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
    half = root(first)
    cross = np.trace(root(half @ second @ half))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


@pytest.mark.parametrize(("n", "m", "width"), [(60, 50, 8), (6, 5, 32), (3, 90, 32), (2, 2, 64), (20, 30, 1)])
def test_frechet_distance_is_that_of_the_oracle_for_any_rank(n: int, m: int, width: int) -> None:
    x, y = features(n, width), features(m, width, seed=1, shift=0.3)
    assert frechet_distance(x, y) == pytest.approx(frechet_oracle(x, y), rel=1e-5)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-5)


@pytest.mark.parametrize(("count", "width"), [(50, 8), (5, 64)])
def test_a_shift_is_its_square_and_nothing_is_nothing(count: int, width: int) -> None:
    x = features(count, width)
    assert frechet_distance(x, x + 0.5) == pytest.approx(0.25 * width, rel=1e-5)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("count", "width"), [(50, 8), (5, 64)])
def test_frechet_distance_ignores_order_and_rotation(count: int, width: int) -> None:
    x, y = features(count, width), features(count, width, seed=1)
    turned = torch.linalg.qr(torch.randn(width, width)).Q
    before = frechet_distance(x, y)
    assert frechet_distance(x[torch.randperm(count)], y) == pytest.approx(before, rel=1e-5)
    assert frechet_distance(x @ turned, y @ turned) == pytest.approx(before, rel=1e-4)


class Quarters(nn.Module):
    """Of images of any size and type, since the metric tries one of its own."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = torch.rand(40, 3, 2, 2), torch.rand(30, 3, 2, 2) * 0.8
    theirs = FrechetInceptionDistance(Quarters())
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert frechet_distance(x.flatten(1), y.flatten(1)) == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_stored_statistics_stand_for_the_images(tmp_path: Path) -> None:
    x, y = features(50, 8), features(60, 8, seed=1)
    np.savez(tmp_path / "reference.npz", mu=y.mean(0).numpy(), sigma=np.cov(y.numpy(), rowvar=False))
    statistics = read_statistics(tmp_path / "reference.npz")
    assert statistics.keys() == {"pooled"}
    assert frechet_distance(x, statistics["pooled"]) == pytest.approx(frechet_distance(x, y), rel=1e-5)
    with pytest.raises(ConfigurationError, match=r"Features have length 7, but the reference has 8\."):
        frechet_distance(x[:, :7], statistics["pooled"])


def test_statistics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        read_statistics(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    with pytest.raises(ConfigurationError, match="lacks mu, sigma; it has arr_0"):
        read_statistics(tmp_path / "other.npz")


def test_kernel_distance_over_all_images_is_that_of_loops() -> None:
    x, y = features(7, 5).double(), features(7, 5, seed=1, shift=0.5).double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    others = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in others) / 42
    across = sum(kernel(a, b) for a in x for b in y) / 49
    assert kernel_distance(x, y) == pytest.approx(within - 2 * across, rel=1e-9)


def test_kernel_distance_draws_the_same_subsets_each_time() -> None:
    x, y = features(30, 5), features(40, 5, seed=1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = kernel_distance(x, y, subset_size=10)
    assert kernel_distance(x, y, subset_size=10) == before
    assert kernel_distance(x, y, subset_size=11) != before


def test_inception_score_of_sure_and_even_classes_is_their_number() -> None:
    logits = 50 * torch.eye(5).repeat(10, 1)
    assert inception_score(logits) == pytest.approx(5, rel=1e-6)
    assert inception_score(logits[:1].expand(50, -1)) == pytest.approx(1, rel=1e-6)


def test_inception_score_of_few_images_is_that_of_the_definition() -> None:
    p = torch.randn(12, 4).double().softmax(1)
    divergence = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert inception_score(p.log()) == pytest.approx(float(divergence.exp()), rel=1e-9)


def test_too_few_images_are_said() -> None:
    with pytest.raises(UnavailableError, match="1 images, but at least 2 are needed"):
        frechet_distance(features(1, 4), features(9, 4))
    with pytest.raises(UnavailableError, match="9 images, but at least 10 are needed"):
        kernel_distance(features(20, 4), features(9, 4), subset_size=10)
