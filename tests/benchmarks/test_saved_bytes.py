"""Counted bytes of graphs."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.saved_bytes import peak_saved_bytes

FLOAT = 4


def chain(length: int, size: int = 250) -> Tensor:
    x = torch.ones(size, requires_grad=True)
    for _ in range(length):
        x = (x * 0.1).exp()
    return x.sum()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_each_result_that_backward_needs_is_counted_once(length: int) -> None:
    assert peak_saved_bytes(lambda: chain(length).backward()) == length * 250 * FLOAT


def test_graphs_one_after_the_other_take_what_the_largest_takes() -> None:
    def call() -> None:
        for length in (2, 5, 3):
            chain(length).backward()

    assert peak_saved_bytes(call) == 5 * 250 * FLOAT


def test_graphs_that_are_kept_add_up_and_those_let_go_of_do_not() -> None:
    kept: list[Tensor] = []
    assert peak_saved_bytes(lambda: kept.extend(chain(3) for _ in range(4))) == 12 * 250 * FLOAT
    assert peak_saved_bytes(lambda: [None for _ in range(4) if chain(3) is None]) == 3 * 250 * FLOAT
    assert len(kept) == 4


def test_views_of_one_memory_are_counted_once_and_with_all_of_it() -> None:
    x = torch.ones(100, 2)
    w = torch.ones(100, requires_grad=True)
    assert peak_saved_bytes(lambda: (x[:, 0] * w + x[:, 1] * w).sum().backward()) == 200 * FLOAT


def test_memory_that_is_there_anyway_can_be_left_out() -> None:
    layer, x = nn.Linear(50, 50), torch.ones(3, 50, requires_grad=True)

    def call() -> None:
        layer(x).sum().backward()

    assert peak_saved_bytes(call) == (50 * 50 + 3 * 50) * FLOAT
    assert peak_saved_bytes(call, without=layer.parameters()) == 3 * 50 * FLOAT
    assert peak_saved_bytes(call, without=[*layer.parameters(), x]) == 0


def test_nothing_is_held_without_gradients() -> None:
    with torch.no_grad():
        assert peak_saved_bytes(lambda: chain(5)) == 0


def test_recomputing_shows() -> None:
    def block(x: Tensor) -> Tensor:
        for _ in range(6):
            x = (x * 0.1).exp()
        return x

    def call(recomputed: bool) -> None:
        x = torch.ones(1000, requires_grad=True)
        for _ in range(3):
            x = checkpoint(block, x, use_reentrant=True) if recomputed else block(x)
        x.sum().backward()

    plain, less = (peak_saved_bytes(lambda r=r: call(r)) for r in (False, True))  # type: ignore[misc]
    assert plain == 18 * 1000 * FLOAT
    assert less < 10 * 1000 * FLOAT


def test_gradients_are_what_they_are_without_counting() -> None:
    x = torch.randn(5, 5, requires_grad=True)
    (plain,) = torch.autograd.grad(x.exp().mm(x).sum(), x)
    found: list[Tensor] = []
    peak_saved_bytes(lambda: found.extend(torch.autograd.grad(x.exp().mm(x).sum(), x)))
    assert torch.equal(found[0], plain)


def test_an_error_comes_through() -> None:
    def call() -> None:
        raise KeyError("what happened")

    with pytest.raises(KeyError, match="what happened"):
        peak_saved_bytes(call)
    assert peak_saved_bytes(lambda: chain(1).backward()) == 250 * FLOAT
