"""LightningDataModules for classification; every one keeps a held-out share of the training images."""

from lightning_quant.data.base import ImageDataModule, TrainingSplits, held_out_split
from lightning_quant.data.cifar import CIFARDataModule
from lightning_quant.data.digits import DigitsDataModule
from lightning_quant.data.image_folder import ImageFolderDataModule
from lightning_quant.data.tensor_images import RandomCropFlip, TensorImages

__all__ = [
    "CIFARDataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "RandomCropFlip",
    "TensorImages",
    "TrainingSplits",
    "held_out_split",
]
