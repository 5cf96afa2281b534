"""Why a measure cannot be computed."""

from lightning_quant.errors import QuantizationError


class UnavailableError(QuantizationError):
    """What a measure needs is not here: weights that cannot be had, images that were not given.

    :class:`~lightning_quant.metrics.GenerationMetrics` names the measures it stands for, and computes the others.
    """
