"""Random numbers for images, which depend only on the seed, the number of the image, and their use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_quant.errors import ConfigurationError

# Streams of an image: its initial noise, then one per step, and, beyond all steps, the draw of its label.
_INITIAL, _FIRST_STEP, _LABEL = 0, 1, 2**31


def numbers(ids: Iterable[int] | Tensor) -> list[int]:
    """Convert the numbers of images to a list of int.

    Args:
        ids: Whole numbers in 0 .. 2^32 - 1, as a tensor (n,) or any iterable.

    Raises:
        ConfigurationError: A number is out of range.

    Example:
        >>> numbers(torch.arange(3)), numbers(range(2))
        ([0, 1, 2], [0, 1])
    """
    image_numbers = [int(number) for number in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    invalid = [number for number in image_numbers if not 0 <= number < 2**32]
    if invalid:
        raise ConfigurationError(
            f"ids contains {invalid[0]}: expected image numbers in 0 .. 2^32 - 1, for example range(256)."
        )
    return image_numbers


def initial_noise(
    shape: Sequence[int], ids: Iterable[int] | Tensor, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw the standard normal noise x_0 from which images are generated.

    Args:
        shape: Shape of one image, (C, H, W).
        ids: Numbers of the images, (n,).
        seed: Non-negative seed.
        dtype: Type of the result. The noise is drawn in FP32 and then converted.

    Returns:
        Noise of shape (n, C, H, W) on the CPU. The noise of an image is the same in every batch and on every rank.

    Example:
        >>> both = initial_noise((1, 2, 2), [4, 7], seed=0)
        >>> torch.equal(both[1:], initial_noise((1, 2, 2), [7], seed=0))
        True
    """
    return _normal(shape, ids, seed, _INITIAL).to(dtype)


def step_noise(shape: Sequence[int], ids: Iterable[int] | Tensor, k: int, seed: int) -> Tensor:
    """Draw the standard normal noise that step k of a stochastic sampler adds.

    Args:
        shape: Shape of one image, (C, H, W).
        ids: Numbers of the images, (n,).
        k: Index of the step. 0 is the first one from noise.
        seed: Non-negative seed.

    Returns:
        Noise of shape (n, C, H, W), FP32, on the CPU.

    Example:
        >>> torch.equal(step_noise((1, 2, 2), [4], 0, seed=0), initial_noise((1, 2, 2), [4], seed=0))
        False
    """
    return _normal(shape, ids, seed, _FIRST_STEP + k)


def drawn_number(number: int, seed: int, below: int) -> int:
    """Draw a number in 0 .. below - 1 for one image, for example its label.

    Example:
        >>> [drawn_number(number, seed=0, below=10) for number in range(6)]
        [8, 1, 6, 7, 4, 3]
    """
    return int(_generator(number, seed, _LABEL).integers(below))


def _normal(shape: Sequence[int], ids: Iterable[int] | Tensor, seed: int, stream: int) -> Tensor:
    image_numbers = numbers(ids)
    noise = np.empty((len(image_numbers), *shape), dtype=np.float32)
    for row, number in zip(noise, image_numbers, strict=True):
        _generator(number, seed, stream).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def _generator(number: int, seed: int, stream: int) -> np.random.Generator:
    # NumPy, since PyTorch's CPU generator uses only 32 bits of a seed, so that collisions are likely among 10^5 seeds,
    # and it draws different numbers on a processor without AVX2.
    if seed < 0:
        raise ConfigurationError(f"seed={seed}: expected a non-negative number, for example seed=0.")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, stream)))
