import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_quant.functional import blocks as module
from lightning_quant.functional.blocks import blocks, dense, in_memory, is_dense, like

few = settings(deadline=None, max_examples=60)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4)


@few
@given(shapes, st.randoms())
def test_any_order_of_axes_is_dense(shape: list[int], random: object) -> None:
    x = torch.zeros(shape)
    order = list(range(x.dim()))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert is_dense(x.permute(order))
    assert dense(x.permute(order)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(4, 6)[:, 1:],
        torch.zeros(1, 6).expand(4, 6),
        torch.zeros(9).as_strided((3, 3), (1, 1)),
    ],
    ids=["strided", "sliced", "expanded", "overlapping"],
)
def test_gaps_and_overlaps_are_not_dense(x: torch.Tensor) -> None:
    assert not is_dense(x)
    assert is_dense(dense(x))
    assert torch.equal(dense(x), x)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_every_element_is_visited_once_and_aligned(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", size)
    a = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    b, visits = a.clone(memory_format=torch.preserve_format), torch.zeros_like(a)
    lengths = []
    for x, y, z in blocks(a, b, visits):
        assert torch.equal(x, y)
        lengths.append(len(x))
        z += 1
    assert (visits == 1).all()
    assert max(lengths) <= size


def test_the_view_in_memory_order_shares_its_memory() -> None:
    x = torch.arange(6.0).view(2, 3).t()
    assert in_memory(x).tolist() == list(range(6))
    in_memory(x)[0] = 9
    assert x[0, 0] == 9


def test_like_copies_only_where_strides_differ() -> None:
    x, layout = torch.arange(6.0).view(2, 3), torch.zeros(3, 2).t()
    assert like(x, torch.ones(2, 3)) is x
    moved = like(x, layout)
    assert moved.stride() == layout.stride()
    assert torch.equal(moved, x)
