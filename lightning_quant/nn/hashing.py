"""What a file or a network's float weights are, in one line, by which they are known again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from lightning_quant.quantizers import Quantizer


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of the parameters and buffers of a network, quantizers left out.

    >>> from lightning_quant.nn import swap
    >>> from lightning_quant.quantizers import FixedQuantizer
    >>> network = nn.Sequential(nn.Linear(2, 2))
    >>> in_float = weights_hash(network)
    >>> _ = swap(network[0], weight_quantizer=FixedQuantizer(4, axis=0))
    >>> weights_hash(network) == in_float
    True
    """
    digest = hashlib.sha256()
    quantizers = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, Quantizer))
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not name.startswith(quantizers):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
