"""LightningModules for image classification and image diffusion."""

from lightning_quant.tasks.classification import ImageClassifier
from lightning_quant.tasks.diffusion import ImageDiffusion

__all__ = ["ImageClassifier", "ImageDiffusion"]
