"""ResNets for 32x32 images by He et al. (2015), section 4.2, with 6n + 2 layers and 16/32/64 channels.

Shortcuts have no parameters (option A). Kim et al. (ECCV 2024) add a BatchNorm1d before the classifier.
"""

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError

__all__ = ["CIFARResNet", "cifar_resnet20", "cifar_resnet32", "cifar_resnet56"]

_CFG = {
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "num_classes": 10,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "conv1",
    "classifier": "linear",
}

default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _CFG for depth in (20, 32, 56)})


class _Block(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut, which subsamples and pads the new channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(residual + self._shortcut(x))
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class CIFARResNet(nn.Module):
    """Residual network for small images, with timm's interface.

    Args:
        depth: Number of layers with weights, ``6 n + 2``: 20, 32, 44, 56, ...
        num_classes: Number of classes. 0 omits the classifier and returns the pooled features.
        in_chans: Number of channels of the images.
        head_norm: Whether a ``BatchNorm1d`` precedes the classifier, as in the recipe for INT4 training. Without it,
            the keys and the function are those of the usual public CIFAR ResNets.
        drop_rate: Dropout rate before the classifier.

    Shape:
        Images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``, with H and W at least 4.

    Raises:
        ConfigurationError: ``depth`` is not ``6 n + 2``.

    Example:
        >>> import timm, torch
        >>> network = timm.create_model("cifar_resnet20", num_classes=10)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> network.forward_features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_chans: int = 3,
        head_norm: bool = True,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ConfigurationError(
                f"A CIFAR ResNet has 6 n + 2 layers, but found depth={depth}. Write for example depth=20."
            )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 64
        self.drop_rate = drop_rate
        blocks = depth // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.head_norm = nn.BatchNorm1d(64) if head_norm else nn.Identity()
        self.linear = _classifier(num_classes)
        self.apply(_initialize)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature maps, ``(N, 64, H / 4, W / 4)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits ``(N, num_classes)`` of feature maps, or the classifier's input with ``pre_logits``."""
        x = self.head_norm(x.mean(dim=(2, 3)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with ``num_classes`` outputs. Pooling is always the average."""
        if global_pool not in (None, "avg"):
            raise ConfigurationError(f"CIFARResNet supports only global_pool='avg', but found {global_pool!r}.")
        self.num_classes = num_classes
        reference = self.conv1.weight
        self.linear = _classifier(num_classes).apply(_initialize).to(reference.device, reference.dtype)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(_Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _classifier(num_classes: int) -> nn.Module:
    return nn.Linear(64, num_classes) if num_classes > 0 else nn.Identity()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _build(depth: int, pretrained: bool, kwargs: dict[str, Any]) -> CIFARResNet:
    network: CIFARResNet = build_model_with_cfg(CIFARResNet, f"cifar_resnet{depth}", pretrained, depth=depth, **kwargs)
    return network


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """Create a ResNet-20 with 0.27 M parameters. The keywords are those of :class:`CIFARResNet`.

    Example:
        >>> sum(p.numel() for p in cifar_resnet20(head_norm=False).parameters())
        269722
    """
    return _build(20, pretrained, kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """Create a ResNet-32 with 0.46 M parameters. The keywords are those of :class:`CIFARResNet`.

    Example:
        >>> len(cifar_resnet32().layer1)
        5
    """
    return _build(32, pretrained, kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """Create a ResNet-56 with 0.85 M parameters. The keywords are those of :class:`CIFARResNet`.

    Example:
        >>> len(cifar_resnet56().layer1)
        9
    """
    return _build(56, pretrained, kwargs)
