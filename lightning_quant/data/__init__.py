"""LightningDataModules for classification, and calibration images from anybody's Trainer and DataModule.

Every DataModule keeps a held-out share of the training images.
"""

from lightning_quant.data.base import ImageDataModule, TrainingSplits, held_out_split
from lightning_quant.data.calibration import calibration_images, fingerprint, images_of
from lightning_quant.data.calibration_source import (
    CalibrationData,
    CalibrationSource,
    calibration_source,
    from_trainer,
)
from lightning_quant.data.cifar import CIFARDataModule
from lightning_quant.data.digits import DigitsDataModule
from lightning_quant.data.fashion_mnist import FashionMNISTDataModule
from lightning_quant.data.image_folder import ImageFolderDataModule
from lightning_quant.data.tensor_images import RandomCropFlip, TensorImages

__all__ = [
    "CIFARDataModule",
    "CalibrationData",
    "CalibrationSource",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "RandomCropFlip",
    "TensorImages",
    "TrainingSplits",
    "calibration_images",
    "calibration_source",
    "fingerprint",
    "from_trainer",
    "held_out_split",
    "images_of",
]
