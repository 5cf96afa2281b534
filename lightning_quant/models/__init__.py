"""Networks that timm lacks, registered with timm when this package is imported."""

from lightning_quant.models.cifar_resnet import (
    CIFARResNet,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet56,
)

__all__ = ["CIFARResNet", "cifar_resnet20", "cifar_resnet32", "cifar_resnet56"]
