"""Rules that tell from a layer's figures why it loses, each with what it saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_quant.analysis.layers import INPUT, WEIGHT, LayerAnalysis
from lightning_quant.metrics.tensor_error import TensorFigures

# A rule speaks where its figure is past these.
MUCH_CLIPPED = 0.02
DEAD_CODES = 0.5
# Of a signal that is as large as its noise.
NOTHING_LEFT = 1.5
WIDE_CHANNEL = 8.0
LITTLE_NEGATIVE = 1e-3
# Rounding of a uniform tensor that fills b bits loses about 6 dB a bit; this much more is worth a word.
BELOW_UNIFORM = 9.0


Kind = Literal["noise only", "outlier channels", "codes below 0", "clipped", "unused codes", "noisy"]


@dataclass(frozen=True)
class Cause:
    """Reason why a tensor loses much.

    Attributes:
        kind: Rule that spoke.
        slot: Tensor, "input" or "weight" for example.
        text: Figure that shows it, in words.
    """

    kind: Kind
    slot: str
    text: str

    def __str__(self) -> str:
        return f"{self.slot}: {self.text}"


def find_causes(layer: LayerAnalysis) -> list[Cause]:
    """What stands out in a layer's figures; empty where nothing does.

    Example:
        >>> figures = TensorFigures(4, 0.0, 90.0, 8.0, 0.0, 0.3, 0.0, True, 40.0)
        >>> for cause in find_causes(LayerAnalysis("fc", "Linear", (8, 8), 0, {"input": figures})):
        ...     print(cause)
        input: outlier channels, the widest is 40 times the median one
        input: codes for values below 0, of which there are none
        input: 70% of the codes are never used
    """
    return [Cause(kind, slot, text) for slot, figures in layer.tensors.items() for kind, text in _of(slot, figures)]


def _of(slot: str, figures: TensorFigures) -> Iterator[tuple[Kind, str]]:
    activation, said = slot != WEIGHT, False
    if figures.sqnr < NOTHING_LEFT:
        left = max(figures.sqnr, 0.0)
        yield "noise only", f"hardly anything is left of it ({left:.0f} dB): most values lie within half a step"
        return
    if slot == INPUT and figures.channel_ratio is not None and figures.channel_ratio > WIDE_CHANNEL:
        said = True
        yield "outlier channels", f"outlier channels, the widest is {figures.channel_ratio:.0f} times the median one"
    if activation and figures.signed and figures.negative < LITTLE_NEGATIVE and figures.codes_used is not None:
        said = True
        yield (
            "codes below 0",
            f"codes for values below 0, of which there are {'none' if not figures.negative else 'hardly any'}",
        )
    # The range of a weight is narrower than it where that makes the error smaller.
    if activation and figures.clipped is not None and figures.clipped > MUCH_CLIPPED:
        said = True
        yield "clipped", f"{figures.clipped:.1%} of the values are clipped"
    if figures.codes_used is not None and figures.codes_used < DEAD_CODES:
        said = True
        yield "unused codes", f"{1 - figures.codes_used:.0%} of the codes are never used"
    if figures.sqnr < 6.02 * figures.bits - BELOW_UNIFORM - 6 and not said:
        yield "noisy", f"signal to noise of {figures.sqnr:.0f} dB, low for {figures.bits} bits"
