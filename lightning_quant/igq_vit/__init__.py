"""Method 3: vision transformers whose activation channels are regrouped for each image."""

from lightning_quant.igq_vit.callback import IGQViT
from lightning_quant.igq_vit.module import IGQViTModule

__all__ = ["IGQViT", "IGQViTModule"]
