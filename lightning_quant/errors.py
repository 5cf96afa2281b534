"""Exceptions of the package. Every message says what was found, what was expected and what to write instead."""


class QuantizationError(Exception):
    """Base class of all errors that the package raises on purpose."""


class ConfigurationError(QuantizationError, ValueError):
    """An argument, a configuration or a folder layout cannot be used as given."""


class UnsupportedModelError(QuantizationError, TypeError):
    """The network has no layer that the method supports, or has one that it does not support."""


class CheckpointError(QuantizationError, RuntimeError):
    """A checkpoint does not match the quantizers of the module it is loaded into."""


class UnavailableError(QuantizationError):
    """Something that a measure needs is missing: weights that cannot be downloaded, images that were not given.

    :class:`~lightning_quant.metrics.GenerationMetrics` names the measures that it affects and computes the others.
    """
