"""RepQ-style reparameterization: a quantizer for each channel after a LayerNorm, turned into one for the layer.

Source: Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", ICCV 2023
(arXiv 2212.08254), equations 5 to 9. A baseline; written from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.functional.groups import affine_parameters
from lightning_quant.igq_vit.settings import Settings
from lightning_quant.quantizers import FixedQuantizer
from lightning_quant.quantizers.statistics import gather


@dataclass(frozen=True)
class _Output:
    """What a LayerNorm gave: its module, and sums by which its output is recognised when windows have been cut."""

    norm: nn.LayerNorm
    sums: Tensor

    @classmethod
    def of(cls, norm: nn.LayerNorm, output: Tensor) -> _Output:
        return cls(norm, _sums(output))


def _sums(x: Tensor) -> Tensor:
    rows = x.detach().flatten(0, -2).double()
    return torch.stack([rows.sum(dim=0), rows.abs().sum(dim=0)])


class Reparameterization:
    """Finds the LayerNorm before each layer, and moves the differences between channels into both.

    The network stays the same function in float: the norm's affine part and the next weight change together.

    Args:
        network: whose LayerNorms are watched.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.last: _Output | None = None

    def hooks(self) -> list[RemovableHandle]:
        """Watch the outputs of all LayerNorms with an affine part."""

        def note(norm: nn.Module, args: Any, output: Tensor) -> None:
            assert isinstance(norm, nn.LayerNorm)
            self.last = _Output.of(norm, output)

        norms = [m for m in self.network.modules() if isinstance(m, nn.LayerNorm) and m.bias is not None]
        return [norm.register_forward_hook(note) for norm in norms]

    def apply(self, name: str, layer: nn.Linear, x: Tensor, settings: Settings) -> tuple[Tensor, FixedQuantizer | None]:
        """Reparameterize a layer where its input is the output of the last LayerNorm.

        Args:
            name: of the layer.
            layer: its weight and bias change, and the norm's.
            x: (..., channels), the input of this rank.
            settings: bits.

        Returns:
            the input as the changed norm gives it, and its quantizer; ``x`` and None where no norm is before it.
        """
        norm, self.last = self.last, None
        if norm is None or getattr(layer, "bias", None) is None or norm.norm.weight.shape != x.shape[-1:]:
            return x, None
        if not torch.allclose(norm.sums, _sums(x), rtol=1e-6, atol=1e-6 * float(norm.sums[1].max())):
            return x, None
        flat = x.flatten(0, -2).float()
        ends = gather(torch.stack(flat.aminmax(dim=0))[None])
        scales, zero_points = affine_parameters(ends[:, 0].amin(0), ends[:, 1].amax(0), settings.activation_bits)
        scale, zero_point = scales.mean(), zero_points.mean().round()
        ratio, shift = scales / scale, scales * (zero_points - zero_point)
        _change(norm.norm, layer, ratio, shift)
        quantizer = FixedQuantizer(settings.activation_bits, symmetric=False).to(x.device)
        quantizer.scale, quantizer.zero_point, quantizer.ready = scale, zero_point, True
        return ((x.float() + shift) / ratio).to(x.dtype), quantizer


@torch.no_grad()
def _change(norm: nn.LayerNorm, layer: nn.Linear, ratio: Tensor, shift: Tensor) -> None:
    norm.weight.div_(ratio)
    norm.bias.add_(shift).div_(ratio)
    layer.bias.sub_(layer.weight.float() @ shift)
    layer.weight.mul_(ratio)
