"""Learning of the rounding of weights and the ranges of activations of a prepared denoiser."""

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
    """Leaf tensors of all quantizers of a network, with their Adam optimizer.

    Step sizes of activations are learned as logarithms, zero points in codes, rounding as AdaRound's variables.

    Args:
        network: Prepared network, all quantizers with ranges; they learn until :meth:`commit` or :meth:`cancel`.
        settings: Settings of the parameters to learn and their learning rates.
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
                # Scaled so that a zero point moves as far as the end of the range moves with the step size.
                rate = rates[leaf, type(quantizer)] * (quantizer.grid.high if leaf == "zero_point" else 1)
                tensor.requires_grad_(rate > 0)
                groups += [{"params": [tensor], "lr": rate}] if rate > 0 else []
        self.optimizer = torch.optim.Adam(_merged(groups))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def learned(self) -> list[Tensor]:
        """Leaf tensors that are learned."""
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    def release(self) -> None:
        """Propagate the gradients accumulated in held weights to the leaves."""
        for quantizer in self.quantizers.values():
            if isinstance(quantizer, RoundedQuantizer):
                quantizer.release()

    def step(self, loss: Tensor, rate: float = 1.0) -> float:
        """Update the leaves with the gradients of all ranks, summed in one collective, and clear the gradients.

        Args:
            loss: Share of this rank in the loss, a scalar.
            rate: Factor of the learning rates.

        Returns:
            Loss over all ranks. If it is not finite, the leaves are not updated.
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
        """Store the current leaves as the best ones."""
        self.best = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    @torch.no_grad()
    def commit(self) -> None:
        """Let the quantizers adopt the best leaves, and stop learning."""
        for name, tensor in self.best.items():
            self.leaves[name].copy_(tensor)
        for quantizer in self.quantizers.values():
            quantizer.end()

    def cancel(self) -> None:
        """Restore the quantizers to their state before learning."""
        for quantizer in self.quantizers.values():
            quantizer.cancel()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the leaves, the best leaves and Adam's moments by flat names."""
        state = {f"leaf/{name}": leaf.detach() for name, leaf in self.leaves.items()}
        state.update({f"{_BEST}/{name}": tensor for name, tensor in self.best.items()})
        for name, leaf in self.leaves.items():
            for key, value in self.optimizer.state.get(leaf, {}).items():
                state[f"{_ADAM}/{name}/{key}"] = value
        return {key: value.clone() for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a state."""
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
    return begun + [(f"{name}.{slot}", quantizer, quantizer.begin()) for (name, slot), quantizer in activations.items()]


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
    """Merge parameter groups of equal learning rate, as Adam is faster with fewer groups."""
    merged: dict[object, list[Tensor]] = {}
    for group in groups:
        merged.setdefault(group["lr"], []).extend(group["params"])  # type: ignore[arg-type]
    return [{"params": params, "lr": rate} for rate, params in merged.items()]
