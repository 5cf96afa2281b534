"""Hashes that identify files, weights and images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Compute the SHA-256 of the names, types, shapes and bytes of tensors, in hexadecimal.

    Args:
        named: Names and tensors of any shape. Their order matters.

    Example:
        >>> tensors_hash([("weight", torch.zeros(2))]) == tensors_hash([("bias", torch.zeros(2))])
        False
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of the bytes of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(images: Tensor) -> str:
    """Compute the SHA-256 of the type, shape and bytes of images, in hexadecimal.

    Example:
        >>> fingerprint(torch.zeros(2, 3, 8, 8))[:8] == fingerprint(torch.zeros(2, 3, 8, 8))[:8]
        True
        >>> fingerprint(torch.zeros(2, 3, 8, 8)) == fingerprint(torch.zeros(2, 3, 4, 16))
        False
    """
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)} ".encode())
    digest.update(images.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
