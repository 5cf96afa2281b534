"""Whether a weight is the one that was seen before."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.quantizers.identity import fingerprint, mark


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    values: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return nn.Parameter(values)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 2, 3, 3), (7, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_change_of_a_bit_changes_the_fingerprint(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    one = weight(*shape, dtype=dtype)
    before = int(fingerprint(one))
    assert before
    assert int(fingerprint(one.detach().clone())) == before
    assert int(fingerprint(-one)) != before
    one.data.view(-1)[-1] = one.data.view(-1)[-1] * 1.01
    assert int(fingerprint(one)) != before


def test_layout_makes_no_difference_and_order_does() -> None:
    one = weight(128, 8)
    assert int(fingerprint(one.detach().T.contiguous().T)) == int(fingerprint(one))
    assert int(fingerprint(one.flip(0))) != int(fingerprint(one))


def test_a_mark_changes_with_each_way_to_write() -> None:
    one = weight(4, 4)
    seen = [mark(one)]
    assert mark(one) == seen[0]
    with torch.no_grad():
        one.mul_(2)
    seen.append(mark(one))
    one.data.mul_(2)
    seen.append(mark(one))
    one.data = one.data.clone()
    seen.append(mark(one))
    assert len(set(seen)) == 4
