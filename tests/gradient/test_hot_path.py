"""An ordinary training step reads no number on the host, and sends one collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.gradient import FixedInterval, IntervalStrategy, LargeGradientInterval, MinimumErrorInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.gradient.optimizer import QuantizerOptimizer
from lightning_quant.gradient.preparation import quantize_layers
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.nn import Bits, plan_layers

# .item(), float(), bool(), .tolist() of one element, and what has a shape that depends on values.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What is read in the block; ``tolist`` and ``numpy`` of CPU tensors are no operators, and are watched by name."""
    mode = _Reads()
    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy"):
            patch.setattr(Tensor, name, _counting(getattr(Tensor, name), name, mode.counts))
        with mode:
            yield mode.counts


def _counting(method: Callable[..., Any], name: str, counts: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return method(*args, **kwargs)

    return counted


class Training:
    """A small network that is trained as the callback does it, or in float."""

    def __init__(self, interval: IntervalStrategy | None, momentum: float = 0.9) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(),
            nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 9, 16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=momentum)
        self.images, self.labels = torch.randn(16, 3, 10, 10), torch.randint(0, 10, (16,))
        self.noise = NoiseSource(0)
        self.quantizers: QuantizerOptimizer | None = None
        if interval is not None:
            layers = quantize_layers(self.network, plan_layers(self.network, Bits(4, 4, 4)).chosen, interval)
            for layer in layers.values():
                assert isinstance(layer.gradient_quantizer, GradientQuantizer)
                layer.gradient_quantizer.run.noise = self.noise
            self.quantizers = QuantizerOptimizer(layers, self.optimizer, 1e-5)

    def step(self) -> None:
        self.noise.restart(1)
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(self.images), self.labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.quantizers is not None:
            self.quantizers.step()


@pytest.mark.parametrize(
    "interval",
    [LargeGradientInterval(), FixedInterval(0.6), MinimumErrorInterval(every=100)],
    ids=lambda i: type(i).__name__,
)
def test_an_ordinary_step_reads_no_number(monkeypatch: pytest.MonkeyPatch, interval: IntervalStrategy) -> None:
    plain, quantized = Training(None), Training(interval)
    for training in (plain, quantized):
        training.step()
    with reads(monkeypatch) as in_float:
        plain.step()
    with reads(monkeypatch) as in_four_bits:
        quantized.step()
    assert in_four_bits == in_float


def test_the_check_sees_the_reads_of_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges start from statistics on the host: the counter above counts forward and backward."""
    training = Training(LargeGradientInterval())
    with reads(monkeypatch) as counts:
        training.step()
    assert counts["tolist"] > 0
    assert counts["_local_scalar_dense"] > 0


def test_a_step_sends_one_flat_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(LargeGradientInterval())
    training.step()
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: sent.append(tensor.mul_(2)))
    gammas = [q.gamma.clone() for q in training.quantizers.gradient_quantizers.values()] if training.quantizers else []
    training.step()
    assert [tensor.dim() for tensor in sent] == [1]
    # Two ranks that sent the same agree with each of them, but for the step of gamma.
    assert training.quantizers is not None
    for before, quantizer in zip(gammas, training.quantizers.gradient_quantizers.values(), strict=True):
        assert abs(before - quantizer.gamma) <= 1e-3 + 1e-6
