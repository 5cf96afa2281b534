"""INT4 training as a Lightning callback."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_quant.errors import ConfigurationError, QuantizationError
from lightning_quant.functional.grid import check_bits
from lightning_quant.gradient.history import History, layer_metrics
from lightning_quant.gradient.interval import IntervalStrategy, LargeGradientInterval
from lightning_quant.gradient.noise import NoiseSource
from lightning_quant.gradient.optimizer import QuantizerOptimizer
from lightning_quant.gradient.preparation import (
    check_order,
    check_still_there,
    layer_bits,
    layers_of,
    quantize_layers,
    signs_of,
)
from lightning_quant.gradient.quantizer import GradientQuantizer
from lightning_quant.gradient.steps import StepListener
from lightning_quant.gradient.summary import execution_note, few, integer_paths, thawed_layers, unstarted_layers
from lightning_quant.nn import Bits, Plan, plan_layers
from lightning_quant.nn.late import after_setup, cancel_after_setup
from lightning_quant.nn.layers import Execution, QuantizedLayer
from lightning_quant.nn.selection import FirstAndLast, Patterns, check_first_and_last
from lightning_quant.nn.structure import mark, quantized_layers, strip
from lightning_quant.nn.what_ran import WhatRan


class GradientQuantization(WhatRan):
    """Train with weights, activations and gradients on low-bit grids: INT4 training for any LightningModule.

    Source: Kim et al., "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients", ECCV 2024.
    Conv, ConvTranspose and Linear layers are exchanged in ``setup``; optimizers, schedulers, hooks and loops stay
    untouched. Weights keep a float master copy; products are simulated in float unless ``execution="integer"``.

    Args:
        weight_bits: Bit-width of the weights, 2 to 16; 32 keeps them in float.
        activation_bits: Bit-width of the layers' inputs, 2 to 16; 32 keeps them in float.
        gradient_bits: Bit-width of the gradients of the layers' outputs, 2 to 16; 32 keeps them in float.
        interval: Strategy of the gradient quantizer, by default ``LargeGradientInterval()``.
        first_and_last: Treatment of the first and the last layer: "float" keeps them in float, "8bit" gives them
            8 bits, "same" quantizes them like the others.
        include: Fnmatch patterns of the names of modules to quantize, with all below them; None takes all that trains.
        exclude: Fnmatch patterns of the names of modules to leave in float, with all below them.
        quantizer_lr: Learning rate of the ranges of weights and activations. It follows the schedule of the optimizer.
        execution: Execution of the products: "simulated" computes them in float, "integer" multiplies int8 codes with
            int32 accumulation where all three tensors have codes that fit, and gives the same numbers.
        signed: Signs of the layers' inputs, by fnmatch pattern of the layers' names: whether they have negative
            values. The first batch decides for all others.
        log_every_n_steps: Number of steps between two logs of intervals and errors, which checkpoints keep too; None
            takes the Trainer's, 0 logs nothing.

    Raises:
        ConfigurationError: An argument out of its range. Patterns and layers are checked when the Trainer starts.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = GradientQuantization(4, 4, 4)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        weight_bits: int = 4,
        activation_bits: int = 4,
        gradient_bits: int = 4,
        interval: IntervalStrategy | None = None,
        first_and_last: FirstAndLast = "float",
        include: Patterns = None,
        exclude: Patterns = None,
        quantizer_lr: float = 1e-5,
        execution: Execution = "simulated",
        signed: dict[str, bool] | None = None,
        log_every_n_steps: int | None = None,
    ) -> None:
        self.bits = Bits(weight_bits, activation_bits, gradient_bits)
        for name, value in self.bits._asdict().items():
            check_bits(value, f"{name}_bits", allow_float=True)
        if execution not in ("simulated", "integer"):
            raise ConfigurationError(f'execution={execution!r}: expected "simulated" or "integer".')
        if not quantizer_lr >= 0:
            raise ConfigurationError(f"quantizer_lr={quantizer_lr}: a learning rate is at least 0, for example 1e-5.")
        if not isinstance(interval, IntervalStrategy | None):
            raise ConfigurationError(
                f"interval={interval!r}: expected an instance of a strategy, for example MinMaxInterval()."
            )
        check_first_and_last(first_and_last)
        self.interval = LargeGradientInterval() if interval is None else interval
        self.first_and_last: FirstAndLast = first_and_last
        self.include, self.exclude = include, exclude
        self.quantizer_lr = quantizer_lr
        self.execution: Execution = execution
        self.signed = signed or {}
        self.log_every_n_steps = log_every_n_steps
        self.noise: NoiseSource | None = None
        self.batches = 0
        self.history = History()
        self._layers: dict[str, QuantizedLayer] = {}
        self._frozen: dict[str, torch.nn.Module] = {}
        self._optimizers: list[QuantizerOptimizer] = []
        self._listener: StepListener | None = None
        self._restored: dict[str, Any] = {}
        self._warned = False
        self._said: set[str] = set()

    def plan(self, module: torch.nn.Module) -> Plan:
        """Plan what the callback would quantize, without changing the module.

        Args:
            module: Module to quantize.

        Returns:
            Plan that prints as a table.
        """
        return plan_layers(module, self.bits, self.first_and_last, self.include, self.exclude, training=True)

    # -- structure ---------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Exchange the layers before the module is wrapped and before optimizers exist.

        Layers that the module builds in its own ``setup``, which Lightning calls later, are exchanged right after it.
        """
        self._restored = {}
        if stage == "fit":
            self.history = History()
        if not is_overridden("setup", pl_module):
            self._complete(trainer, pl_module, stage)
            return
        fresh, known = False, set[torch.nn.Module]()
        # What is there is exchanged now: other callbacks make copies. What is missing is told when nothing more comes.
        with suppress(QuantizationError):
            fresh = self._exchange(trainer, pl_module, stage)
            known = layers_of(pl_module)
        after_setup(pl_module, partial(self._complete, trainer, pl_module, stage, known, fresh))

    def _complete(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stage: str,
        known: Collection[torch.nn.Module] = (),
        fresh: bool = False,
    ) -> None:
        """Exchange the layers of a network that is complete when ``configure_model`` has run.

        Args:
            trainer: Trainer of the run.
            pl_module: Module of the run.
            stage: Name that Lightning gives to the stage.
            known: Layers that were there at an earlier exchange; nothing is done where there are no others.
            fresh: Whether that exchange began with a float network, which it goes back to.
        """
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # its layers must exist now; Lightning asks for it to be idempotent
        if known and layers_of(pl_module) <= {*known}:
            return
        if fresh:
            strip(pl_module)
        self._exchange(trainer, pl_module, stage)

    def _exchange(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> bool:
        """Exchange the layers, and return whether the network was in float before."""
        plan = self.plan(pl_module)
        present = dict(quantized_layers(pl_module))
        check_order(trainer, self, plan)
        in_float = not present
        if in_float:
            shown = plan if stage == "fit" else plan.summary()
            strategy = type(self.interval).__name__
            rank_zero_info(f"{shown}\nGradients by {strategy}; products are {execution_note(self.execution)}.")
            originals = {layer.name: layer.original for layer in plan.layers}
            signs = signs_of(self.signed, list(plan.chosen))
            present = quantize_layers(pl_module, plan.chosen, self.interval, self.execution, signs, originals)
        elif found := {name: layer_bits(layer) for name, layer in present.items()}.items() ^ plan.chosen.items():
            raise QuantizationError(
                "The module is already quantized, with other layers or bit-widths than this callback plans"
                f" ({few({name for name, _ in found})}): call lightning_quant.strip(module) first, or give the"
                " callback the arguments it was quantized with."
            )
        self._layers = present
        self._frozen = {name: pl_module.get_submodule(name) for name in plan.frozen}
        self.noise = NoiseSource(torch.initial_seed(), trainer.global_rank)
        for quantizer in self._gradient_quantizers().values():
            quantizer.interval = self.interval
            # Lightning's tuner trains a few steps without the hooks of callbacks.
            quantizer.run.noise = self.noise if stage == "fit" else None
        for layer in present.values():
            layer.execution = self.execution
        return in_float

    def _gradient_quantizers(self) -> dict[str, GradientQuantizer]:
        found = {name: layer.gradient_quantizer for name, layer in self._layers.items()}
        return {name: q for name, q in found.items() if isinstance(q, GradientQuantizer)}

    # -- training ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the steps of the optimizers.

        Earlier is too early: a sharded checkpoint is loaded after ``on_fit_start``, with a step of each optimizer.
        """
        check_still_there(pl_module, self._layers)
        seed = self._restored.get("seed", torch.initial_seed())
        self._warned = False
        self._said = set()
        self.batches = self._restored.get("batches", 0)
        self.noise = NoiseSource(seed, trainer.global_rank)
        for quantizer in self._gradient_quantizers().values():
            quantizer.run.noise = self.noise
            quantizer.run.reset_counts()
        self._optimizers = []
        for optimizer, layers in _owners(trainer.optimizers, self._layers):
            self._optimizers.append(QuantizerOptimizer(layers, optimizer, self.quantizer_lr))
        self._stop_listening()
        self._listener = StepListener(self._optimizers, partial(_step, trainer))
        for ours, state in zip(self._optimizers, self._restored.get("optimizers", []), strict=False):
            ours.load_state_dict(state)
        self._restored = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the rounding noise of this batch, and measure errors where they will be logged."""
        assert self.noise is not None
        assert self._listener is not None
        if message := thawed_layers(self._frozen):
            self._frozen = {}
            rank_zero_warn(message)
        self._listener.begin_batch()
        self.noise.restart(self.batches)
        self.batches += 1
        every = trainer.log_every_n_steps if self.log_every_n_steps is None else self.log_every_n_steps  # type: ignore[attr-defined]
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        observes = bool(every and last and (trainer.global_step + 1) % every == 0)
        for quantizer in self._gradient_quantizers().values():
            quantizer.run.observes = observes

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log intervals and errors, and with integer execution report once which layers used int8 codes."""
        assert self._listener is not None
        self._listener.end_batch()
        if self.execution == "integer" and self.batches == 1:
            rank_zero_info(integer_paths(self._layers))
        metrics = layer_metrics(self._gradient_quantizers())
        if metrics:
            self._check_agreement()
            self.history.add(trainer.global_step, metrics)
        for logger in trainer.loggers if metrics else []:
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop where ranks train different networks; warn once of layers without ranges and of ranges that moved."""
        self._check_agreement()
        self._say_followed()
        message = unstarted_layers(self._layers)
        if message and not self._warned:
            self._warned = True
            rank_zero_warn(message)

    def _say_followed(self) -> None:
        times = {name: count for ours in self._optimizers for name, count in ours.followed().items()}
        new = [f"{name} ({count} times)" for name, count in times.items() if name not in self._said]
        self._said |= times.keys()
        if new:
            rank_zero_info(f"Ranges lagged behind their tensors and were doubled or halved: {', '.join(new)}.")

    def _check_agreement(self) -> None:
        for optimizer in self._optimizers:
            optimizer.check_agreement()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop following the optimizers. The module stays quantized, see ``lightning_quant.strip``."""
        cancel_after_setup(pl_module)
        self._stop_listening()
        # Without the callback nobody moves the intervals; training on without it must say so.
        for quantizer in self._gradient_quantizers().values():
            quantizer.run.noise = None
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop following the optimizers and waiting for the module's ``setup``."""
        cancel_after_setup(pl_module)
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.stop()
        self._listener = None

    # -- evaluation --------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate what was never trained; Lightning's sanity check before training runs in float."""
        if not trainer.sanity_checking:
            self._check_ready()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate what was never trained."""
        self._check_ready()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate what was never trained."""
        self._check_ready()

    def _check_ready(self) -> None:
        both = [q for layer in self._layers.values() for q in (layer.input_quantizer, layer.weight_quantizer)]
        quantizers = [quantizer for quantizer in both if quantizer is not None]
        if quantizers and not any(quantizer.ready for quantizer in quantizers):
            raise QuantizationError(
                "No quantizer of the module has a range, since it was never trained quantized: call trainer.fit"
                " first, or pass ckpt_path= with a checkpoint of a quantized training. Without the callback the"
                " module runs in float."
            )

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue exactly, beside the state of the module."""
        # Of a fit that had nothing left to train.
        if self._restored:
            return self._restored
        if self.noise is None:
            return {}
        optimizers = [ours.state_dict() for ours in self._optimizers]
        history = self.history.state_dict()
        return {"seed": self.noise.seed, "batches": self.batches, "optimizers": optimizers, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state until the optimizers exist."""
        self._restored = state_dict
        self.history = History(state_dict.get("history"))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark the checkpoint as quantized. Its structure is in the names of its tensors."""
        mark(checkpoint["state_dict"], "GradientQuantization")


def _step(trainer: pl.Trainer, ours: QuantizerOptimizer) -> None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # As a tensor: get_scale() would wait for the device.
    ours.step(1.0 if scaler is None else scaler._scale)


def _owners(
    optimizers: list[torch.optim.Optimizer], layers: dict[str, QuantizedLayer]
) -> list[tuple[torch.optim.Optimizer, dict[str, QuantizedLayer]]]:
    """Pair optimizers with the layers whose weights they hold; layers of none, which are frozen, go to the first."""
    owner = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    shares: list[dict[str, QuantizedLayer]] = [{} for _ in optimizers]
    for name, layer in layers.items():
        indices = [owner[id(p)] for p in layer.parameters() if id(p) in owner]
        if shares:
            shares[indices[0] if indices else 0][name] = layer
    return [(optimizer, share) for optimizer, share in zip(optimizers, shares, strict=True) if share]
