"""Denoisers with a uniform call: from a state and a timestep to the output that the scheduler's step takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError, QuantizationError, UnsupportedModelError

# Rows (n, ...) by argument name of the network; "uncond_..." for the unconditional branch.
Conditioning = dict[str, Tensor]
# Function from (network, x, t, conditioning without "uncond_...") to the network's output (n, channels, H, W).
Call = Callable[[nn.Module, Tensor, "int | Tensor", Conditioning], Tensor]

UNCONDITIONAL = "uncond_"
SUPPORTED = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


class Denoiser:
    """Wrapper of a network with its guidance, called once per step; it has no state of its own but a counter.

    With guidance both branches form one batch in the order of diffusers' pipelines: the unconditional branch first,
    for a DiT the conditional one. Gradients flow through both. The channels of a learned variance are dropped.

    Args:
        network: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, or any module whose forward takes (sample,
            timestep, **conditioning) and returns a tensor, a tuple that begins with one, or an object with ``sample``.
        guidance: Scale w of uncond + w (cond - uncond), above 1; None or 1 uses the conditional branch alone.
        call: Function that replaces the default call of the network.

    Attributes:
        calls: Number of network calls; both branches of guidance count as one call.

    Raises:
        ConfigurationError: Guidance below 1.
        UnsupportedModelError: Another denoiser of diffusers, or one that needs further conditions.

    Example:
        >>> class Half(nn.Module):
        ...     def forward(self, sample, timestep, class_labels):
        ...         return sample / 2 + class_labels.view(-1, 1, 1, 1)
        >>> denoiser = Denoiser(Half(), guidance=3.0)
        >>> labels = {"class_labels": torch.tensor([1.0]), "uncond_class_labels": torch.tensor([0.0])}
        >>> denoiser(torch.zeros(1, 1, 1, 1), 10, labels).item(), denoiser.calls
        (3.0, 1)
    """

    def __init__(self, network: nn.Module, guidance: float | None = None, call: Call | None = None) -> None:
        kind = check_denoiser(network) if call is None else ""
        self.network, self.guidance = network, _checked_guidance(guidance)
        self.calls = 0
        self._call = call or _CALLS[kind]
        self._conditional_first = kind == "DiTTransformer2DModel"

    def __call__(self, x: Tensor, t: int | Tensor, conditioning: Conditioning | None = None) -> Tensor:
        """Return the output that the scheduler's step takes.

        Args:
            x: States (n, C, H, W).
            t: Timestep of all images, or (n,).
            conditioning: Rows (n, ...) by name; {} or None for none.

        Returns:
            Output (n, C, H, W) in the dtype of ``x``.

        Raises:
            ConfigurationError: Guidance without an unconditional branch, or conditioning without one row per image.
            UnsupportedModelError: Output of another shape.
        """
        cond, uncond = _branches(conditioning or {}, len(x))
        if self.guidance is None:
            return self._output(x, t, cond)
        _check_both(cond, uncond, self.guidance, _conditions_of(self.network))
        first, second = (cond, uncond) if self._conditional_first else (uncond, cond)
        both = {name: torch.cat([first[name], second[name]]) for name in cond}
        times = torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() and len(t) > 1 else t
        halves = self._output(torch.cat([x, x]), times, both).chunk(2)
        conditional, unconditional = halves if self._conditional_first else halves[::-1]
        return unconditional + self.guidance * (conditional - unconditional)

    def _output(self, x: Tensor, t: int | Tensor, conditioning: Conditioning) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), x.dtype)
        rows = {name: r.to(dtype) if r.is_floating_point() else r for name, r in conditioning.items()}
        self.calls += 1
        output = self._call(self.network, x.to(dtype), t, rows)
        if output.shape != x.shape:
            raise UnsupportedModelError(
                f"{type(self.network).__name__} returned {tuple(output.shape)} for a state {tuple(x.shape)}: expected"
                " the same shape; only a DiT's learned variance is dropped. Write Denoiser(network, call=...) with a"
                " function that returns what the scheduler's step takes."
            )
        return output.to(x.dtype)

    def __repr__(self) -> str:
        return f"Denoiser({type(self.network).__name__}, guidance={self.guidance})"


def check_denoiser(network: nn.Module) -> str:
    """Return the supported diffusers class of a network; empty for networks from elsewhere.

    Raises:
        UnsupportedModelError: Another class of diffusers, or a config that asks for further conditions.
    """
    kinds = [kind.__name__ for kind in type(network).__mro__ if kind.__module__.split(".")[0] == "diffusers"]
    supported = next((name for name in kinds if name in SUPPORTED), "")
    if kinds and not supported:
        raise UnsupportedModelError(
            f"{type(network).__name__} is no denoiser that AccuQuant knows; supported are {', '.join(SUPPORTED)}, and"
            " modules of your own whose forward takes (sample, timestep, **conditioning)."
        )
    config: Any = getattr(network, "config", {}) if supported else {}
    for option in ("addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type"):
        if config.get(option) is not None:
            raise UnsupportedModelError(
                f"This {supported} has {option}={config[option]!r}, and needs inputs beside encoder_hidden_states that"
                " the samplers do not pass: write Denoiser(network, call=...) with a function that adds them."
            )
    return supported


def _checked_guidance(guidance: float | None) -> float | None:
    if guidance is None or guidance == 1:
        return None
    if not (math.isfinite(guidance) and guidance > 1):
        raise ConfigurationError(f"guidance={guidance}: expected a scale above 1, as 7.5, or None for no guidance.")
    return float(guidance)


def _branches(conditioning: Conditioning, n: int) -> tuple[Conditioning, Conditioning]:
    for name, rows in conditioning.items():
        if len(rows) != n:
            raise ConfigurationError(f"{name} has {len(rows)} rows for {n} images: expected one row per image.")
    uncond = {key.removeprefix(UNCONDITIONAL): r for key, r in conditioning.items() if key.startswith(UNCONDITIONAL)}
    return {key: r for key, r in conditioning.items() if not key.startswith(UNCONDITIONAL)}, uncond


def _check_both(cond: Conditioning, uncond: Conditioning, guidance: float, parameters: list[str]) -> None:
    if cond and cond.keys() == uncond.keys():
        return
    missing = [UNCONDITIONAL + name for name in cond if name not in uncond] or sorted(uncond)
    usual = parameters[0] if parameters else "class_labels"
    raise ConfigurationError(
        f"guidance={guidance} needs both branches, and the conditioning has {sorted(cond) or 'none'} and no"
        f" {', '.join(missing) or f'{usual} and {UNCONDITIONAL}{usual}'}: give both, or guidance=None."
    )


def check_call(denoiser: Denoiser, x: Tensor, t: int, conditioning: Conditioning) -> Tensor:
    """Call a denoiser for the first time, and return its output.

    Args:
        denoiser: Denoiser that a calibration is about to call many times.
        x: States (n, C, H, W).
        t: Timestep.
        conditioning: Rows (n, ...) by name.

    Raises:
        ConfigurationError: Network that cannot be called with these arguments; the message says what its forward takes.
        UnsupportedModelError: Output of another shape.

    Example:
        >>> class Wants(nn.Module):
        ...     def forward(self, sample, timestep, context):
        ...         return sample
        >>> check_call(Denoiser(Wants()), torch.zeros(1, 1, 2, 2), 10, {})
        Traceback (most recent call last):
        ...
        lightning_quant.errors.ConfigurationError: Wants was called with a state of shape (1, 1, 2, 2), a timestep...
    """
    try:
        return denoiser(x, t, conditioning)
    except (QuantizationError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        network = denoiser.network
        given = ", ".join(name for name in conditioning if not name.startswith(UNCONDITIONAL)) or "no condition"
        parameters = _conditions_of(network)
        name = parameters[0] if parameters else "class_labels"
        raise ConfigurationError(
            f"{type(network).__name__} was called with a state of shape {tuple(x.shape)}, a timestep and {given}, and"
            f" raised {type(error).__name__}: {error}\nBeside state and timestep its forward takes"
            f" {', '.join(parameters) or 'nothing'}. For conditions write a subclass of AccuQuant with"
            f" def conditioning(self, pl_module, ids): return {{{name!r}: ROWS}}, one row for each id and with"
            f" guidance also {UNCONDITIONAL + name!r}, or AccuQuantModule with the pipeline and prompts=FILE; for"
            " another state write sample_shape=(C, H, W)."
        ) from error


def _conditions_of(network: nn.Module) -> list[str]:
    """Return the parameter names of a network's forward beside state and timestep, required ones first."""
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    parameters = [p for p in signature(network.forward).parameters.values() if p.kind not in variadic][2:]
    return [p.name for p in sorted(parameters, key=lambda p: p.default is not Parameter.empty)]


def _call_module(network: nn.Module, x: Tensor, t: int | Tensor, conditioning: Conditioning) -> Tensor:
    """Call a module by position, as its first two arguments may have any name."""
    return _tensor(network(x, _times(t, x), **conditioning), network)


def _call_unet(network: nn.Module, x: Tensor, t: int | Tensor, conditioning: Conditioning) -> Tensor:
    """Call a UNet with a plain number as timestep, which it converts to a tensor itself."""
    return _tensor(network(x, t, **conditioning), network)


def _call_dit(network: nn.Module, x: Tensor, t: int | Tensor, conditioning: Conditioning) -> Tensor:
    """Call a DiT as DiTPipeline does, and drop the channels of a learned variance."""
    output = _tensor(network(x, timestep=_times(t, x), **conditioning), network)
    return output[:, : x.shape[1]] if output.shape[1] // 2 == x.shape[1] else output


_CALLS: dict[str, Call] = {
    "": _call_module,
    "UNet2DModel": _call_unet,
    "UNet2DConditionModel": _call_unet,
    "DiTTransformer2DModel": _call_dit,
}


def _times(t: int | Tensor, x: Tensor) -> Tensor:
    """Return the timesteps as a tensor (n,), int64 for a plain number."""
    timesteps = t if isinstance(t, Tensor) else torch.tensor(t)
    return timesteps.to(x.device).expand(len(x))


def _tensor(output: Any, network: nn.Module) -> Tensor:
    tensor = output[0] if isinstance(output, tuple | list) and output else getattr(output, "sample", output)
    if not isinstance(tensor, Tensor):
        raise UnsupportedModelError(
            f"{type(network).__name__} returned a {type(output).__name__}: expected a tensor, a tuple that begins with"
            " one, or an object with the attribute sample."
        )
    return tensor
