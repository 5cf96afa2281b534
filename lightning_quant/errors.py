"""The errors of the package: every one says what was found, what was expected and what to write instead."""


class QuantizationError(Exception):
    """Base class of all errors that the package raises on purpose."""


class ConfigurationError(QuantizationError, ValueError):
    """An argument, a configuration or a folder layout cannot be used as given."""


class UnsupportedModelError(QuantizationError, TypeError):
    """The network has no layer that the method can work on, or one that it cannot work on."""


class CheckpointError(QuantizationError, RuntimeError):
    """A checkpoint does not fit the quantizers of the module it is loaded into."""


class UnavailableError(QuantizationError):
    """What a measure needs is not here: weights that cannot be had, images that were not given.

    :class:`~lightning_quant.metrics.GenerationMetrics` names the measures it stands for, and computes the others.
    """
