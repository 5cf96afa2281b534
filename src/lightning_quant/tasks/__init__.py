"""LightningModules for the tasks that the package trains, calibrates and measures."""

from lightning_quant.tasks.classification import ImageClassifier

__all__ = ["ImageClassifier"]
