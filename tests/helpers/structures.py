"""Networks of random structure: what somebody may stack, share and tie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.vits import spread

CHANNELS = 8
KINDS = (
    "conv",
    "grouped",
    "depthwise",
    "dilated",
    "reflect",
    "transposed",
    "linear",
    "batchnorm",
    "groupnorm",
    "layernorm",
    "relu",
    "gelu",
    "attention",
    "encoder",
    "residual",
    "shared",
    "tied",
    "twice",
)
# A layer is its kind and which of the layers before it is meant, where it repeats one.
structures = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 7)), min_size=1, max_size=7)


class Tokens(nn.Module):
    """A module of tokens (n, t, c) on images (n, c, h, w)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if isinstance(self.inner, nn.MultiheadAttention):
            tokens, _ = self.inner(tokens, tokens, tokens, need_weights=False)
        else:
            tokens = self.inner(tokens)
        output: Tensor = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return output


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.inner(x)
        return output


class Twice(nn.Module):
    """One module called two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(self.inner(x))
        return output


def _convolution(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, **{"padding": 1, **options})


def _plain(kind: str) -> nn.Module:
    match kind:
        case "conv":
            return _convolution()
        case "grouped":
            return _convolution(groups=2, bias=False)
        case "depthwise":
            return _convolution(groups=CHANNELS)
        case "dilated":
            return _convolution(dilation=2, padding="same")
        case "reflect":
            return _convolution(padding_mode="reflect")
        case "transposed":
            return nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1)
        case "linear":
            return Tokens(nn.Linear(CHANNELS, CHANNELS))
        case "batchnorm":
            return nn.BatchNorm2d(CHANNELS)
        case "groupnorm":
            return nn.GroupNorm(2, CHANNELS)
        case "layernorm":
            return Tokens(nn.LayerNorm(CHANNELS))
        case "relu":
            return nn.ReLU(inplace=True)
        case "gelu":
            return nn.GELU()
        case "attention":
            return Tokens(nn.MultiheadAttention(CHANNELS, 2, batch_first=True))
        case "encoder":
            return Tokens(nn.TransformerEncoderLayer(CHANNELS, 2, 16, dropout=0.0, batch_first=True))
        case _:
            return Residual(_convolution())


def body(structure: list[tuple[str, int]]) -> nn.Sequential:
    """(n, 8, h, w) to the same; weights by the structure alone."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for kind, which in structure:
        before = layers[which % len(layers)] if layers else None
        if kind == "shared" and before is not None:
            layers.append(before)
        elif kind == "twice" and before is not None:
            layers.append(Twice(before))
        elif kind == "tied" and isinstance(before, nn.Conv2d) and before.groups == 1:
            layer = _convolution()
            layer.weight = before.weight
            layers.append(layer)
        else:
            layers.append(_plain(kind))
    return nn.Sequential(*layers)


class Stack(pl.LightningModule):
    """A random body with a first convolution and a classifier, to train."""

    def __init__(self, structure: list[tuple[str, int]]) -> None:
        super().__init__()
        self.body = body(structure)
        torch.manual_seed(1)
        self.first, self.head = nn.Conv2d(3, CHANNELS, 1), nn.Linear(CHANNELS, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.first(images)).mean((2, 3)))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


class StackDenoiser(nn.Module):
    """A random body between two convolutions, told the timestep."""

    def __init__(self, structure: list[tuple[str, int]]) -> None:
        super().__init__()
        self.body = body(structure)
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(1, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 1, 1)
        self.time = nn.Linear(1, CHANNELS)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(timestep.float().view(-1, 1) / 1000)[..., None, None]
        output: Tensor = self.last(self.body(self.first(sample) + shift))
        return output


@dataclass(frozen=True)
class Transformer:
    """What a vision transformer of timm is made of."""

    depth: int
    heads: int
    options: dict[str, Any]
    shares: bool

    def make(self) -> nn.Module:
        """On 1 x 8 x 8 images; the last block is the first, where it shares."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "num_classes": 3}
        network: Any = timm.create_model(
            "vit_tiny_patch16_224", depth=self.depth, num_heads=self.heads, **sizes, **self.options
        )
        spread(network)
        if self.shares:
            network.blocks[-1] = network.blocks[0]
        return network.eval()  # type: ignore[no-any-return]


transformers = st.builds(
    Transformer,
    depth=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "qkv_bias": st.booleans(),
            "qk_norm": st.booleans(),
            "init_values": st.sampled_from([None, 0.1]),
            "mlp_ratio": st.sampled_from([1.0, 4.0]),
            "global_pool": st.sampled_from(["token", "avg", "map"]),
            "reg_tokens": st.sampled_from([0, 2]),
            "pre_norm": st.booleans(),
            "fc_norm": st.booleans(),
            "dynamic_img_size": st.booleans(),
        },
    ),
    shares=st.booleans(),
)
