"""Networks that timm does not have, registered with timm by importing this package."""

from lightning_quant.models.cifar_resnet import (
    CIFARResNet,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet56,
)

__all__ = ["CIFARResNet", "cifar_resnet20", "cifar_resnet32", "cifar_resnet56"]
