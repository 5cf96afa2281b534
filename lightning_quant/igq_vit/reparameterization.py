"""RepQ-style reparameterization: channel-wise quantization after a LayerNorm, converted to layer-wise.

Source: Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", ICCV 2023
(arXiv 2212.08254), equations 5 to 9. A baseline, implemented from the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_quant.errors import UnsupportedModelError
from lightning_quant.functional.groups import affine_parameters
from lightning_quant.igq_vit.settings import Settings
from lightning_quant.quantizers import FixedQuantizer
from lightning_quant.utilities.distributed import gather

# A channel whose values differ by less than this share of their size is constant: its step size would be noise.
CONSTANT = 1e-4
# Share of the largest output: above the effect of rounding, below that of a norm whose output has two consumers.
TOLERANCE = 1e-3


class Reparameterization:
    """Reparameterization that absorbs differences between channels after a LayerNorm into the norm and the next layer.

    The network computes the same function in float, since the norm's affine parameters and the layer's weight change
    together.

    Args:
        network: Network in float.
        names: Names of its fully connected layers that are quantized.
        forward: Function that runs the network on the calibration images. The constructor calls it once to find the
            norm before each layer.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], forward: Callable[[], object]) -> None:
        self.network, self.forward = network, forward
        self.norms: dict[str, nn.LayerNorm] = {}
        self._changed: dict[Tensor, Tensor] = {}
        self._outputs = self._find_norms(names)

    def _find_norms(self, names: Sequence[str]) -> list[Tensor]:
        last: list[tuple[nn.LayerNorm, Tensor]] = []
        users: dict[nn.LayerNorm, list[str]] = {}
        calls: dict[nn.LayerNorm, int] = {}

        def normalized(norm: Any, args: Any, output: Tensor) -> None:
            last[:] = [(norm, _sums(output))]
            calls[norm] = calls.get(norm, 0) + 1
            users.setdefault(norm, [])

        def entered(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
                if last and _same(last[0][1], _sums(args[0])):
                    users[last[0][0]].append(name)

            return hook

        norms = [
            m for m in self.network.modules() if isinstance(m, nn.LayerNorm) and getattr(m, "bias", None) is not None
        ]
        handles = [norm.register_forward_hook(normalized) for norm in norms]
        handles += [self.network.get_submodule(name).register_forward_pre_hook(entered(name)) for name in names]
        try:
            outputs = _tensors(self.forward())
        finally:
            for handle in handles:
                handle.remove()
        for norm, layers in users.items():
            single = len(layers) == 1 and calls[norm] == 1
            parameters = self.network.get_submodule(layers[0])._parameters if single else {}
            # A weight that is computed from others cannot be changed.
            if parameters.get("weight") is not None and parameters.get("bias") is not None:
                self.norms[layers[0]] = norm
        return outputs

    def apply(self, name: str, layer: nn.Linear, x: Tensor, settings: Settings) -> tuple[Tensor, FixedQuantizer | None]:
        """Reparameterize a layer if it is the only consumer of a LayerNorm's output.

        Args:
            name: Name of the layer.
            layer: Layer whose weight and bias change, together with the norm's.
            x: Input (..., channels) of this rank.
            settings: Settings with the bit-width.

        Returns:
            Input as the changed norm computes it, and its quantizer; ``x`` and None if there is no such norm.
        """
        if name not in self.norms:
            return x, None
        ends = gather(torch.stack(x.flatten(0, -2).float().aminmax(dim=0))[None])
        low, high = ends[:, 0].amin(0), ends[:, 1].amax(0)
        scales, zero_points = affine_parameters(low, high, settings.activation_bits)
        varies = high - low > CONSTANT * torch.maximum(low.abs(), high.abs())
        if varies.any():
            scale, zero_point = scales[varies].mean(), zero_points[varies].mean().round()
        else:
            scale, zero_point = scales.mean(), torch.zeros_like(scales[0])
        # A constant channel moves to the value of the lowest code.
        ratio = torch.where(varies, scales / scale, 1.0)
        shift = torch.where(varies, scales * (zero_points - zero_point), -low - scale * zero_point)
        self._change(self.norms[name], layer, ratio, shift)
        quantizer = FixedQuantizer(settings.activation_bits, symmetric=False).to(x.device)
        quantizer.scale, quantizer.zero_point, quantizer.ready = scale, zero_point, True
        return ((x.float() + shift) / ratio).to(x.dtype), quantizer

    @torch.no_grad()
    def _change(self, norm: nn.LayerNorm, layer: nn.Linear, ratio: Tensor, shift: Tensor) -> None:
        for parameter in (norm.weight, norm.bias, layer.weight, layer.bias):
            self._changed[parameter] = parameter.clone()
        norm.weight.div_(ratio)
        norm.bias.add_(shift).div_(ratio)
        layer.bias.sub_(layer.weight.float() @ shift)
        layer.weight.mul_(ratio)

    @torch.no_grad()
    def check(self) -> None:
        """Check that the network, in float, still computes the same outputs; undo all changes if it does not.

        Raises:
            UnsupportedModelError: Output of a norm that has another consumer, such as a residual or padded windows.
        """
        for before, after in zip(self._outputs, _tensors(self.forward()), strict=True):
            if float((before - after).abs().max()) > TOLERANCE * float(before.abs().max()):
                for parameter, value in self._changed.items():
                    parameter.copy_(value)
                raise UnsupportedModelError(
                    "scheme='repq' changes each LayerNorm together with the layer after it, but in this network the"
                    " output of a LayerNorm has another consumer: write another scheme. The weights are restored."
                )


def _sums(x: Tensor) -> Tensor:
    """Compute sums (2, channels) that identify an output even after its tokens were moved into windows."""
    rows = x.detach().flatten(0, -2).double()
    return torch.stack([rows.sum(dim=0), rows.abs().sum(dim=0)])


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-6, atol=1e-6 * float(first[1].max()))


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
