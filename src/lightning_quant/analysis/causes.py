"""What a layer's figures say about why it loses, and what to try: rules, each with what it saw."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Finding:
    """A cause with the figure that shows it, and what to write."""

    cause: str
    remedy: str


def find_causes(layer: LayerAnalysis) -> list[Finding]:
    """What stands out in a layer's figures; empty where nothing does.

    >>> figures = TensorFigures(4, 0.0, 90.0, 8.0, 0.0, 0.3, 0.0, True, 40.0)
    >>> for finding in find_causes(LayerAnalysis("fc", "Linear", (8, 8), 0, {"input": figures})):
    ...     print(finding.cause)
    input: outlier channels, the widest is 40 times the median one
    input: codes for values below 0, of which there are none
    input: 70% of the codes are never used
    """
    found = []
    for slot, figures in layer.tensors.items():
        own = _of(slot, figures, layer)
        found += [Finding(f"{slot}: {finding.cause}", finding.remedy) for finding in own]
    return found


def _of(slot: str, figures: TensorFigures, layer: LayerAnalysis) -> list[Finding]:
    found = []
    activation = slot != WEIGHT
    if figures.sqnr < NOTHING_LEFT:
        return [
            Finding(
                f"hardly anything is left of it ({max(figures.sqnr, 0.0):.0f} dB): most values lie within half a step",
                "its range is that of other data. Calibrate on images like these; after a short training running"
                " statistics of batch norms may not have settled, and evaluation sees other values than the training.",
            )
        ]
    if slot == INPUT and figures.channel_ratio is not None and figures.channel_ratio > WIDE_CHANNEL:
        more = "more groups" if layer.groups else "one range for all its channels: IGQViT gives transformers groups"
        remedy = f"{more}; or exclude this layer, or give it 8 bits."
        found.append(
            Finding(f"outlier channels, the widest is {figures.channel_ratio:.0f} times the median one", remedy)
        )
    if activation and figures.signed and figures.negative < LITTLE_NEGATIVE and figures.codes_used is not None:
        found.append(
            Finding(
                f"codes for values below 0, of which there are {'none' if not figures.negative else 'hardly any'}",
                "half of a symmetric grid is lost: signed={'LAYER': False} in GradientQuantization; a calibrated range"
                " follows its images, so calibrate on images like those of the test.",
            )
        )
    # The range of a weight is narrower than it where that makes the error smaller.
    if activation and figures.clipped is not None and figures.clipped > MUCH_CLIPPED:
        found.append(
            Finding(
                f"{figures.clipped:.1%} of the values are clipped",
                "the range is too narrow for these images: calibrate on more or on others; for group_ranges='mean' take"
                " 'searched' or 'envelope'; in training a higher quantizer_lr lets the range grow.",
            )
        )
    if figures.codes_used is not None and figures.codes_used < DEAD_CODES:
        found.append(
            Finding(
                f"{1 - figures.codes_used:.0%} of the codes are never used",
                "the range is wider than the values, or fewer bits are enough here.",
            )
        )
    if figures.sqnr < 6.02 * figures.bits - BELOW_UNIFORM - 6 and not found:
        found.append(
            Finding(
                f"signal to noise of {figures.sqnr:.0f} dB, low for {figures.bits} bits",
                "values have long tails: more bits for this layer, or exclude it.",
            )
        )
    return found
