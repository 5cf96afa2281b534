"""IGQ-ViT (method 3): post-training quantization of vision transformers with per-image groups of channels."""

from lightning_quant.igq_vit.callback import IGQViT
from lightning_quant.igq_vit.module import IGQViTModule

__all__ = ["IGQViT", "IGQViTModule"]
