"""What sets state is called by compiled networks, and not traced."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.functional.products import LinearProduct, Product
from lightning_quant.nn import register, swap
from lightning_quant.nn.layers import LAYERS, QuantizedLayer
from lightning_quant.nn.modes import untraced
from lightning_quant.quantizers import LearnedQuantizer


class Counter:
    """Counts the calls that are executed, and says of each whether it is traced."""

    def __init__(self) -> None:
        self.calls: list[bool] = []

    @untraced
    def count(self, x: Tensor) -> Tensor:
        self.calls.append(torch.compiler.is_compiling())
        return x + 1


def test_is_executed_at_each_call() -> None:
    counter = Counter()
    fast = torch.compile(lambda x: 2 * counter.count(2 * x), backend="eager")
    assert [fast(torch.tensor(value)).item() for value in (1, 2, 3)] == [6, 10, 14]
    assert counter.calls == [False] * 3


def test_is_traced_where_no_state_is_set() -> None:
    add = untraced(lambda x, y: x + y, when=lambda x, y: y is None)
    fast = torch.compile(lambda x: add(x, x), backend="eager", fullgraph=True)
    assert fast(torch.tensor(2)).item() == 4


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_sets_state_until_it_is_ready_and_while_it_trains(grad: bool) -> None:
    layer = swap(nn.Linear(4, 4), LearnedQuantizer(4), LearnedQuantizer(4))
    assert layer.sets_state()
    layer(torch.randn(2, 4))
    with torch.set_grad_enabled(grad):
        assert layer.sets_state() is grad


def test_a_registered_layer_begins_outside_of_the_graph() -> None:
    class Scaled(nn.Linear):
        pass

    @register(Scaled)
    class QuantizedScaled(QuantizedLayer, Scaled):
        def product(self, output_padding: Sequence[int] = ()) -> Product:
            return LinearProduct()

        def forward(self, x: Tensor) -> Tensor:
            return self.quantized_forward(x, self.product())

    try:
        torch.manual_seed(0)
        x = torch.randn(2, 4)
        layers = [swap(Scaled(4, 4), LearnedQuantizer(4), LearnedQuantizer(4)) for _ in range(2)]
        layers[1].load_state_dict(layers[0].state_dict())
        outputs = [layers[0](x), torch.compile(layers[1], backend="eager")(x)]
        torch.testing.assert_close(outputs[1], outputs[0])
        assert all(layer.input_quantizer is not None and layer.input_quantizer.ready for layer in layers)
    finally:
        del LAYERS[Scaled]
