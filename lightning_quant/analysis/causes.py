"""Rules that find out from the statistics of a layer why it loses accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_quant.analysis.layers import INPUT, WEIGHT, LayerAnalysis
from lightning_quant.metrics.tensor_error import TensorFigures

# Thresholds of the rules.
MUCH_CLIPPED = 0.02
DEAD_CODES = 0.5
# SQNR in dB at which the signal is hardly larger than the noise.
NOTHING_LEFT = 1.5
WIDE_CHANNEL = 8.0
LITTLE_NEGATIVE = 1e-3
# A uniform tensor over the full range gains about 6 dB per bit. A loss of this many dB more is reported.
BELOW_UNIFORM = 9.0


Kind = Literal["noise only", "outlier channels", "codes below 0", "clipped", "unused codes", "noisy"]


@dataclass(frozen=True)
class Cause:
    """Reason for the large quantization error of a tensor.

    Attributes:
        kind: Rule that applied.
        slot: Name of the tensor, for example "input" or "weight".
        text: Description with the figure that shows it.
    """

    kind: Kind
    slot: str
    text: str

    def __str__(self) -> str:
        return f"{self.slot}: {self.text}"


def find_causes(layer: LayerAnalysis) -> list[Cause]:
    """Return the causes of large errors in a layer, or an empty list if nothing stands out.

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
    activation, explained = slot != WEIGHT, False
    if figures.sqnr < NOTHING_LEFT:
        sqnr = max(figures.sqnr, 0.0)
        yield "noise only", f"hardly any signal is left ({sqnr:.0f} dB): most values lie within half a step"
        return
    if slot == INPUT and figures.channel_ratio is not None and figures.channel_ratio > WIDE_CHANNEL:
        explained = True
        yield "outlier channels", f"outlier channels, the widest is {figures.channel_ratio:.0f} times the median one"
    if activation and figures.signed and figures.negative < LITTLE_NEGATIVE and figures.codes_used is not None:
        explained = True
        yield (
            "codes below 0",
            f"codes for values below 0, of which there are {'none' if not figures.negative else 'hardly any'}",
        )
    # Weights are not checked, since their range is chosen narrower where that reduces the error.
    if activation and figures.clipped is not None and figures.clipped > MUCH_CLIPPED:
        explained = True
        yield "clipped", f"{figures.clipped:.1%} of the values are clipped"
    if figures.codes_used is not None and figures.codes_used < DEAD_CODES:
        explained = True
        yield "unused codes", f"{1 - figures.codes_used:.0%} of the codes are never used"
    if figures.sqnr < 6.02 * figures.bits - BELOW_UNIFORM - 6 and not explained:
        yield "noisy", f"signal to noise of {figures.sqnr:.0f} dB, low for {figures.bits} bits"
