"""LightningDataModules for classification, each with a held-out split of the training images."""

from lightning_quant.data.base import ImageDataModule, TrainingSplits, held_out_split
from lightning_quant.data.cifar import CIFARDataModule
from lightning_quant.data.digits import DigitsDataModule
from lightning_quant.data.fashion_mnist import FashionMNISTDataModule
from lightning_quant.data.image_folder import ImageFolderDataModule
from lightning_quant.data.tensor_images import RandomCropFlip, TensorImages

__all__ = [
    "CIFARDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "RandomCropFlip",
    "TensorImages",
    "TrainingSplits",
    "held_out_split",
]
