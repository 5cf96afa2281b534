"""Calibration in resumable steps: ranges, blocks, window lengths, updates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.learning import Learner
from lightning_quant.accuquant.ranges import activation_ranges, weight_ranges
from lightning_quant.accuquant.reconstruction import Reconstruction
from lightning_quant.accuquant.settings import Settings, usual_window, windows_of
from lightning_quant.accuquant.source import Source
from lightning_quant.accuquant.windows import network_calls
from lightning_quant.calibration.record import Record, begin_record, below, numbered
from lightning_quant.errors import CheckpointError, QuantizationError
from lightning_quant.nn.agreement import check_quantizers_agree
from lightning_quant.nn.modes import evaluating
from lightning_quant.nn.structure import quantizers_of

# Share of a calibration's network calls that the sweep spends on each window length.
SWEEP_SHARE = 0.25
SWEPT = (1, 2, 5, 10, 20, 50, 100)
_START, _BLOCKS, _END = "ranges", "blocks", "end"
# Stages of a calibration in order, with their names in summaries.
STAGES = {_START: "after ranges", _BLOCKS: "after blocks", _END: "after windows"}


class Calibration:
    """Step-by-step calibration of a denoiser: ranges, blocks one by one, window lengths, updates.

    Each check keeps the state with the smallest accumulated error at the end of the held-out trajectories, so that
    the result is never worse than the state before learning.

    Args:
        source: Network, plan and trajectories.

    Attributes:
        errors: Accumulated RMSE to the held-out float trajectories after each stage, (steps + 1,).
        single_steps: RMSE of single steps from the float states, (steps,), after ranges and at the end.
        sweep: Final error by window length.
        checks: Final error by number of updates.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.errors: dict[str, Tensor] = {}
        self.single_steps: dict[str, Tensor] = {}
        self.sweep: dict[int, float] = {}
        self.checks: dict[int, float] = {}
        self.updates = 0
        self.blocks_done: list[str] = []
        self.worth_saving = False
        self.loss = float("nan")
        self._learner: Learner | None = None
        self._reconstruction: Reconstruction | None = None
        self._ranges: dict[str, Tensor] = {}
        self._committed = False

    # -- progress -----------------------------------------------------------------------------------------------------

    @property
    def candidates(self) -> list[int]:
        """Window lengths of the sweep; empty if the window is given."""
        settings = self.source.settings
        if settings.window != "sweep":
            return []
        return sorted({usual_window(self.source.steps), *(length for length in SWEPT if length <= self.source.steps)})

    @property
    def window(self) -> int:
        """Number of steps in a window: the given one, the default, or the best of the sweep so far."""
        settings = self.source.settings
        if isinstance(settings.window, int):
            return settings.window
        return min(self.sweep, key=self.sweep.__getitem__) if self.sweep else usual_window(self.source.steps)

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that are reconstructed."""
        return self._stage_a.blocks if self.source.settings.reconstruction else []

    @property
    def total(self) -> int:
        """Number of steps if the updates do not stop early."""
        return 1 + len(self.blocks) + len(self.candidates) + self.source.settings.updates

    @property
    def done(self) -> int:
        """Number of completed steps."""
        if self.finished:
            return self.total
        return bool(self.errors) + len(self.blocks_done) + len(self.sweep) + self.updates

    @property
    def finished(self) -> bool:
        """Whether the calibration is complete."""
        return self._committed

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self, advance: Callable[[str], None] = lambda name: None) -> str:
        """Run the next step and return a short name of it."""
        # Between Trainer loops this may be called in inference mode, whose tensors cannot be learned.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(self.source.network),
            _still(self.source.network),
        ):
            self.worth_saving = True
            if not self.errors:
                return self._find_ranges()
            if len(self.blocks_done) < len(self.blocks):
                return self._reconstruct(self.blocks[len(self.blocks_done)])
            missing = [length for length in self.candidates if length not in self.sweep]
            if missing:
                return self._try_length(missing[0])
            return self._update()

    def _find_ranges(self) -> str:
        source = self.source
        activation_ranges(source.network, source.calls(source.steps_to_see))
        weight_ranges(source.network)
        check_quantizers_agree(source.network)
        self.errors[_START] = source.held_out_errors()
        self.single_steps[_START] = source.held_out_single_steps()
        self._committed = not source.settings.updates and not self.blocks
        return "ranges"

    def replay(self) -> None:
        """Call the network on float states at evenly spaced steps."""
        for call in self.source.calls(self.source.steps_to_see):
            call()

    @property
    def _stage_a(self) -> Reconstruction:
        if self._reconstruction is None:
            source, steps = self.source, self.source.steps_to_see
            calls = [(call, source.sampler.timesteps[k]) for call, k in zip(source.calls(steps), steps, strict=False)]
            self._reconstruction = Reconstruction(source.network, source.plan, source.settings, calls, source.branches)
        return self._reconstruction

    def _reconstruct(self, block: str) -> str:
        if not self.blocks_done:
            self._ranges = self._quantizers()
        self._stage_a.run(block)
        self.blocks_done.append(block)
        if len(self.blocks_done) == len(self.blocks):
            self._accept_blocks()
        return block

    def _accept_blocks(self) -> None:
        self.errors[_BLOCKS] = self.source.held_out_errors()
        if self.errors[_BLOCKS][-1] > self.errors[_START][-1]:
            self._load_quantizers(self._ranges)
            # A copy, because safetensors does not store one tensor under two names.
            self.errors[_BLOCKS] = self.errors[_START].clone()
        self._ranges = {}
        if not self.source.settings.updates:
            self._commit(_BLOCKS)

    def _try_length(self, length: int) -> str:
        """Measure the error after some updates with windows of a length, then undo them."""
        settings = self.source.settings
        usual = usual_window(self.source.steps)
        calls = SWEEP_SHARE * settings.updates * network_calls(settings.adjoint, usual)
        learner = Learner(self.source.network, settings)
        updates = max(1, round(calls / network_calls(settings.adjoint, length)))
        for update in range(updates):
            self._learn(learner, length, update, updates)
        self.sweep[length] = float(self.source.held_out_errors()[-1])
        learner.cancel()
        return f"windows of {length}"

    def _update(self) -> str:
        settings = self.source.settings
        learner = self.learner
        if not self.checks:
            # The error before the first update.
            self._look(learner, self.errors.get(_BLOCKS, self.errors[_START]))
        self.loss = self._learn(learner, self.window, self.updates, settings.updates)
        self.updates += 1
        last = self.updates == settings.updates
        self.worth_saving = last or self.updates % settings.check_every == 0
        if self.worth_saving:
            self._look(learner, self.source.held_out_errors())
            if last or self._stalled():
                learner.commit()
                self._learner = None
                self._commit(_END)
        return f"update {self.updates}"

    def _commit(self, stage: str) -> None:
        check_quantizers_agree(self.source.network)
        self.single_steps[stage] = self.source.held_out_single_steps()
        self._committed = True

    @property
    def learner(self) -> Learner:
        """Learner of the quantizers; from its creation on they compute with its leaf tensors."""
        if self._learner is None:
            self._learner = Learner(self.source.network, self.source.settings)
        return self._learner

    def _look(self, learner: Learner, errors: Tensor) -> None:
        if not self.checks or errors[-1] < min(self.checks.values()):
            learner.remember()
            # A copy, because a state stores each tensor separately.
            self.errors[_END] = errors.clone()
        self.checks[self.updates] = float(errors[-1])

    def _stalled(self) -> bool:
        """Return whether the last ``patience`` checks brought no improvement."""
        values = list(self.checks.values())
        return len(values) - 1 - values.index(min(values)) >= self.source.settings.patience

    # -- updates ------------------------------------------------------------------------------------------------------

    def _learn(self, learner: Learner, length: int, update: int, updates: int) -> float:
        """Do one update over all ranks; its number alone decides window and batch, and learning rates decay to 0."""
        source, settings = self.source, self.source.settings
        steps, ids = _draw(settings, windows_of(source.steps, length), source.images, update)
        local_ids = source.share(ids)
        share = source.window_loss(local_ids, steps, total=len(ids)) if local_ids else torch.zeros(())
        loss = learner.step(share, 1 - update / updates)
        if not math.isfinite(loss):
            raise QuantizationError(
                f"The loss of steps {steps.start} .. {steps.stop - 1} is {loss} at update {update}: lower"
                f" rounding_lr ({settings.rounding_lr}) or activation_lr ({settings.activation_lr})."
            )
        return loss

    # -- state --------------------------------------------------------------------------------------------------------

    def _quantizers(self) -> dict[str, Tensor]:
        states = ((name, quantizer.state_dict()) for name, quantizer in quantizers_of(self.source.network))
        return {f"{name}/{key}": value.detach().clone() for name, state in states for key, value in state.items()}

    def _load_quantizers(self, state: Mapping[str, Tensor]) -> None:
        for name, quantizer in quantizers_of(self.source.network):
            prefix = f"{name}/"
            quantizer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def record(self) -> dict[str, Tensor]:
        """Return the content of a report: the plan, errors over the steps, and errors by window length and check."""
        source = self.source
        record = begin_record(self.done, self.total, source.plan, source.settings.as_dict())
        record["timesteps"], record["window"] = torch.tensor(source.sampler.timesteps), torch.tensor(self.window)
        record.update({f"error/{stage}": value for stage, value in self.errors.items()})
        record.update({f"single_step/{stage}": value for stage, value in self.single_steps.items()})
        record.update({f"sweep/{n}": torch.tensor(v, dtype=torch.float64) for n, v in self.sweep.items()})
        record.update({f"check/{n}": torch.tensor(v, dtype=torch.float64) for n, v in self.checks.items()})
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole state of the calibration as tensors by flat names."""
        state = {f"fingerprint/{self.fingerprint()}": torch.tensor(True), **self.record()}
        state["progress"] = torch.tensor([len(self.blocks_done), self.updates, int(self._committed)])
        if self.errors:
            state.update({f"quantizer/{key}": value for key, value in self._quantizers().items()})
        state.update({f"ranges/{key}": value for key, value in self._ranges.items()})
        if self._learner is not None:
            state.update({f"learner/{key}": value for key, value in self._learner.state_dict().items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a state.

        Raises:
            CheckpointError: State of another network or scheduler, or with other settings.
        """
        if f"fingerprint/{self.fingerprint()}" not in state:
            raise CheckpointError(
                "The calibration to resume belongs to another denoiser or scheduler, or has other settings: calibrate"
                " anew, without ckpt_path or with another cache_dir."
            )
        blocks, self.updates, committed = state["progress"].tolist()
        self.blocks_done, self._committed = self.blocks[:blocks], bool(committed)
        self.errors, self.single_steps = (staged(state, kind) for kind in ("error/", "single_step/"))
        self.sweep, self.checks = (
            {number: float(value) for number, value in numbered(state, kind).items()} for kind in ("sweep/", "check/")
        )
        self._ranges = below(state, "ranges/")
        if self.errors:
            self._load_quantizers(below(state, "quantizer/"))
        learned = below(state, "learner/")
        if learned:
            with torch.inference_mode(False):
                self.learner.load_state_dict(learned)

    def fingerprint(self) -> str:
        """Return a hash of the settings, the quantized layers, the sampler and the images."""
        source = self.source
        rows = [(row.name, row.kind, row.parts, row.left_out) for row in source.plan.rows]
        parts = (sorted(source.settings.as_dict().items()), rows, source.sampler.describe(), source.images)
        return hashlib.sha256(repr((*parts, source.held_out)).encode()).hexdigest()[:16]


def staged(record: Record, prefix: str) -> dict[str, Tensor]:
    """Return the entries with a prefix by stage of the calibration, in the order of the stages.

    Args:
        record: Record or state, in any order.
        prefix: Prefix of the entries.

    Example:
        >>> list(staged({"error/end": torch.zeros(1), "error/ranges": torch.zeros(1)}, "error/"))
        ['ranges', 'end']
    """
    entries = below(record, prefix)
    return {stage: entries[stage].cpu() for stage in STAGES if stage in entries}


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """Freeze the network's parameters, so that gradients reach the quantizers only."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _draw(settings: Settings, windows: list[range], images: range, update: int) -> tuple[range, list[int]]:
    """Draw the window and the images of an update: all windows in turn, in a new order each epoch."""
    epoch, place = divmod(update, len(windows))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch))
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + 500_000_009 + update)
    indices = torch.randperm(len(images), generator=generator)[: settings.batch_size]
    return windows[int(order[place])], [images[int(i)] for i in indices]
