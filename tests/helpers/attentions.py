"""Small vision transformers, and what their opened attentions are watched with."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn
from torchvision.models import swin_transformer as tv_swin
from torchvision.models.vision_transformer import VisionTransformer

from lightning_quant.nn import QuantizedAttention, check_attentions, swap_attention

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}

# Untyped for the type checker: old releases have it there and nowhere else.
VitAttention: Any = vars(vision_transformer)["Attention"]


def torchvision_swin(block: Any, merging: Any) -> Any:
    # 11 x 11 and 6 x 6 patches in windows of 4: shifted and padded.
    return tv_swin.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=5, block=block, downsample_layer=merging
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), 64),
    "timm vit qk_norm": (lambda: vision_transformer.VisionTransformer(**SMALL, qk_norm=True), 32),
    "timm vit attention pool": (lambda: vision_transformer.VisionTransformer(**SMALL, global_pool="map"), 32),
    "timm deit": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2), 64),
    "timm swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(2, 2), num_heads=(2, 4), num_classes=5
        ),
        56,
    ),
    "timm beit": (lambda: beit.Beit(**SMALL, use_shared_rel_pos_bias=True, init_values=None), 32),
    "timm eva, rope": (lambda: eva.Eva(**SMALL, use_rot_pos_emb=True, qkv_fused=True), 32),
    "timm eva, separate": (lambda: eva.Eva(**SMALL, use_rot_pos_emb=True, qkv_fused=False), 32),
    "timm relpos": (lambda: vision_transformer_relpos.VisionTransformerRelPos(**SMALL), 32),
    "torchvision vit": (
        lambda: VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5),
        32,
    ),
    "torchvision swin": (
        lambda: torchvision_swin(tv_swin.SwinTransformerBlock, tv_swin.PatchMerging),
        44,
    ),
    "torchvision swin v2": (
        lambda: torchvision_swin(tv_swin.SwinTransformerBlockV2, tv_swin.PatchMergingV2),
        44,
    ),
}


if hasattr(timm.layers, "AttentionRope"):
    NETWORKS["timm eva, AttentionRope"] = lambda: eva.Eva(**SMALL, use_rot_pos_emb=True, attn_type="rope"), 32


WINDOWED = [name for name in NETWORKS if "swin" in name]


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    module = make().eval()
    # Zeros and ones of an initialization would hide biases and position tables.
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module, torch.randn(2, 3, size, size)


def open_all(module: nn.Module, make: Callable[[], nn.Module | None] = lambda: None) -> list[QuantizedAttention]:
    return [
        swap_attention(
            module.get_submodule(name),
            make(),
            make(),
            make(),
            make(),
            module.get_submodule(name.rpartition(".")[0]),
        )
        for name in check_attentions(module)
    ]


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found.float() - expected.float()).abs().max().item()


class Distort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -8 * x


class Seen:
    """Observer: the tensors of each slot."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, Tensor]] = []

    def __call__(self, slot: str, tensor: Tensor) -> None:
        self.tensors.append((slot, tensor))


class Ready(nn.Module):
    ready = True

    def check(self, weight: Tensor) -> None:
        """Any weight will do."""


class Zero(Ready):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Inputs(Ready):
    """Keeps the last input, counts the calls and says what it was told of them."""

    calls = 0
    instances: int | None = None
    told: int | None = None
    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last, self.told = self.calls + 1, x.clone(), self.instances
        return x


class Direct(nn.Module):
    """Calls the fused attention as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
