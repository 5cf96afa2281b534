"""Stepwise calibration for all methods: the module, the callback, the images, the state file and the record."""

from lightning_quant.calibration.image_source import (
    CalibrationData,
    CalibrationSource,
    calibration_source,
    from_trainer,
)
from lightning_quant.calibration.images import calibration_images, images_of

__all__ = [
    "CalibrationData",
    "CalibrationSource",
    "calibration_images",
    "calibration_source",
    "from_trainer",
    "images_of",
]
