"""What is learned of a prepared denoiser: the rounding of its weights, and the ranges of its activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.ranges import activation_quantizers
from lightning_quant.accuquant.settings import Settings
from lightning_quant.nn.structure import quantized_layers
from lightning_quant.quantizers.rounded import RoundedQuantizer
from lightning_quant.quantizers.timestep import TimestepQuantizer
from lightning_quant.utilities.distributed import all_reduce_sum

_BEST, _ADAM = "best", "adam"


class Learner:
    """Leaf tensors of all quantizers of a network, and the Adam that moves them.

    Steps of activations are learned as their logarithm, zero points in codes, rounding as AdaRound's variables.

    Args:
        network: prepared, all quantizers with ranges; its quantizers learn until :meth:`commit` or :meth:`cancel`.
        settings: what is learned, and how fast.
    """

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        self.quantizers: dict[str, RoundedQuantizer | TimestepQuantizer] = {}
        self.leaves: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        groups = []
        rates = _rates(settings)
        for name, quantizer, leaves in _begun(network):
            self.quantizers[name] = quantizer
            self.leaves.update({f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()})
            for leaf, tensor in leaves.items():
                # A zero point is moved as far as the end of the range that a step size moves by the same rate.
                rate = rates[leaf, type(quantizer)] * (quantizer.grid.high if leaf == "zero_point" else 1)
                tensor.requires_grad_(rate > 0)
                groups += [{"params": [tensor], "lr": rate}] if rate > 0 else []
        self.optimizer = torch.optim.Adam(_merged(groups))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def learned(self) -> list[Tensor]:
        """The leaf tensors that move."""
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    def release(self) -> None:
        """Let gradients that wait in held weights flow on to the leaves."""
        for quantizer in self.quantizers.values():
            if isinstance(quantizer, RoundedQuantizer):
                quantizer.release()

    def step(self, loss: Tensor, rate: float = 1.0) -> float:
        """Move the leaves by the gradients of all ranks, and forget those; one collective.

        Args:
            loss: this rank's share of it, ().
            rate: share of the learning rates.

        Returns:
            the loss over all ranks. Where it is not finite, the leaves stay.
        """
        for group, full in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * full
        self.release()
        leaves = self.learned
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        flat = all_reduce_sum(torch.cat([*(g.flatten() for g in gradients), loss.detach().to(leaves[0]).view(1)]))
        *parts, total = flat.split([*(leaf.numel() for leaf in leaves), 1])
        for leaf, part in zip(leaves, parts, strict=True):
            leaf.grad = part.view_as(leaf)
        if bool(total.isfinite()):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def remember(self) -> None:
        """Keep the leaves as they are for the best."""
        self.best = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    @torch.no_grad()
    def commit(self) -> None:
        """Let the quantizers take over the best, and learn no more."""
        for name, tensor in self.best.items():
            self.leaves[name].copy_(tensor)
        for quantizer in self.quantizers.values():
            quantizer.end()

    def cancel(self) -> None:
        """Leave the quantizers as they were before."""
        for quantizer in self.quantizers.values():
            quantizer.cancel()

    def state_dict(self) -> dict[str, Tensor]:
        """Leaves, the best of them, and Adam's moments, by flat names."""
        state = {f"leaf/{name}": leaf.detach() for name, leaf in self.leaves.items()}
        state.update({f"{_BEST}/{name}": tensor for name, tensor in self.best.items()})
        for name, leaf in self.leaves.items():
            for key, value in self.optimizer.state.get(leaf, {}).items():
                state[f"{_ADAM}/{name}/{key}"] = value
        return {key: value.clone() for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name, leaf in self.leaves.items():
            leaf.copy_(state[f"leaf/{name}"])
            moments = {key: f"{_ADAM}/{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(key in state for key in moments.values()):
                self.optimizer.state[leaf] = {
                    key: state[path].clone().cpu() if key == "step" else state[path].clone().to(leaf.device)
                    for key, path in moments.items()
                }
        prefix = f"{_BEST}/"
        self.best = {key.removeprefix(prefix): v.clone() for key, v in state.items() if key.startswith(prefix)}


def _begun(network: nn.Module) -> list[tuple[str, RoundedQuantizer | TimestepQuantizer, dict[str, Tensor]]]:
    begun: list[tuple[str, RoundedQuantizer | TimestepQuantizer, dict[str, Tensor]]] = []
    for name, layer in quantized_layers(network):
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, RoundedQuantizer):
            begun.append((f"{name}.weight_quantizer", quantizer, quantizer.begin(layer.weight)))
            quantizer.holds = True
    activations = activation_quantizers(network)
    return begun + [(f"{name}.{slot}", each, each.begin()) for (name, slot), each in activations.items()]


def _rates(settings: Settings) -> dict[tuple[str, type], float]:
    rounding = settings.rounding_lr if settings.learn in ("all", "rounding") else 0.0
    activations = settings.activation_lr if settings.learn in ("all", "activations") else 0.0
    return {
        ("alpha", RoundedQuantizer): rounding,
        ("log_ratio", RoundedQuantizer): settings.activation_lr if settings.weight_scales else 0.0,
        ("log_ratio", TimestepQuantizer): activations,
        ("zero_point", TimestepQuantizer): activations,
    }


def _merged(groups: list[dict[str, object]]) -> list[dict[str, object]]:
    """One group for each rate, which is what an optimizer is fast with."""
    merged: dict[object, list[Tensor]] = {}
    for group in groups:
        merged.setdefault(group["lr"], []).extend(group["params"])  # type: ignore[arg-type]
    return [{"params": params, "lr": rate} for rate, params in merged.items()]
