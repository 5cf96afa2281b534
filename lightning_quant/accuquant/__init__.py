"""AccuQuant: diffusion models calibrated over windows of denoising steps (NeurIPS 2025, arXiv 2510.20348)."""

from lightning_quant.accuquant.callback import AccuQuant
from lightning_quant.accuquant.module import AccuQuantModule
from lightning_quant.accuquant.pipelines import load_float_pipeline

__all__ = ["AccuQuant", "AccuQuantModule", "load_float_pipeline"]
