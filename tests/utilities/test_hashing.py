"""Hashes tell apart what differs, and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_quant.utilities.hashing import file_hash, fingerprint, tensors_hash

X = torch.tensor([0.0, 1.0])


def test_name_type_shape_value_and_order_count() -> None:
    other = [
        [("b", X)],
        [("a", X.int())],
        [("a", X[None])],
        [("a", X + 1)],
        [("a", X), ("b", X)],
        [("b", X), ("a", X)],
    ]
    hashes = {tensors_hash(named) for named in [[("a", X)], *other]}
    assert len(hashes) == 7
    # The same bits as another type.
    assert tensors_hash([("a", X.view(torch.int32))]) != tensors_hash([("a", X)])


def test_memory_layout_and_gradients_do_not_count() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert fingerprint(x) == fingerprint(x.to(memory_format=torch.channels_last))
    assert tensors_hash([("a", x)]) == tensors_hash([("a", x.clone().requires_grad_())])


def test_a_file_is_its_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(3_000_000))
    other.write_bytes(bytes(3_000_000))
    assert file_hash(one) == file_hash(other)
    other.write_bytes(bytes(2_999_999) + b"\1")
    assert file_hash(one) != file_hash(other)
