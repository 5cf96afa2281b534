"""Random numbers of an image: they depend on the seed, the image's number and what they are for, on nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError

# Streams of an image: the noise it starts from, then one a step, and far from all steps the draw of its label.
_INITIAL, _FIRST_STEP, _LABEL = 0, 1, 2**31


def numbers(ids: Iterable[int] | Tensor) -> list[int]:
    """The numbers of images as a list of int.

    Args:
        ids: whole numbers in 0 .. 2^32 - 1, a tensor (n,) or any iterable.

    Raises:
        ConfigurationError: others.

    Example:
        >>> numbers(torch.arange(3)), numbers(range(2))
        ([0, 1, 2], [0, 1])
    """
    found = [int(number) for number in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    wrong = [number for number in found if not 0 <= number < 2**32]
    if wrong:
        raise ConfigurationError(f"ids has {wrong[0]}: expected numbers of images in 0 .. 2^32 - 1, as range(256).")
    return found


def initial_noise(
    shape: Sequence[int], ids: Iterable[int] | Tensor, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise x_0 that images start from.

    Args:
        shape: (C, H, W) of one image.
        ids: of the images, (n,).
        seed: not negative.
        dtype: drawn in FP32, then converted.

    Returns:
        (n, C, H, W) on the CPU; the row of an image is the same in every batch and on every rank.

    Example:
        >>> both = initial_noise((1, 2, 2), [4, 7], seed=0)
        >>> torch.equal(both[1:], initial_noise((1, 2, 2), [7], seed=0))
        True
    """
    return _normal(shape, ids, seed, _INITIAL).to(dtype)


def step_noise(shape: Sequence[int], ids: Iterable[int] | Tensor, k: int, seed: int) -> Tensor:
    """Standard normal noise that step k of a stochastic sampler adds.

    Args:
        shape: (C, H, W) of one image.
        ids: of the images, (n,).
        k: step, 0 is the first one from noise.
        seed: not negative.

    Returns:
        (n, C, H, W) FP32 on the CPU.

    Example:
        >>> torch.equal(step_noise((1, 2, 2), [4], 0, seed=0), initial_noise((1, 2, 2), [4], seed=0))
        False
    """
    return _normal(shape, ids, seed, _FIRST_STEP + k)


def drawn_number(number: int, seed: int, below: int) -> int:
    """A number in 0 .. below - 1, drawn for one image, as for its label.

    Example:
        >>> [drawn_number(number, seed=0, below=10) for number in range(6)]
        [8, 1, 6, 7, 4, 3]
    """
    return int(_generator(number, seed, _LABEL).integers(below))


def _normal(shape: Sequence[int], ids: Iterable[int] | Tensor, seed: int, stream: int) -> Tensor:
    found = numbers(ids)
    noise = np.empty((len(found), *shape), dtype=np.float32)
    for row, number in zip(noise, found, strict=True):
        _generator(number, seed, stream).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def _generator(number: int, seed: int, stream: int) -> np.random.Generator:
    # NumPy's, because PyTorch's generator on the CPU takes 32 bits of a seed only, of which two among 10^5 seeds
    # often share all, and draws other numbers on a processor without AVX2.
    if seed < 0:
        raise ConfigurationError(f"seed={seed}: expected a number that is not negative, as seed=0.")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, stream)))
