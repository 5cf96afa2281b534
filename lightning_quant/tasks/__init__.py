"""LightningModules for the tasks that the package trains, calibrates and measures."""

from lightning_quant.tasks.classification import ImageClassifier
from lightning_quant.tasks.diffusion import ImageDiffusion

__all__ = ["ImageClassifier", "ImageDiffusion"]
