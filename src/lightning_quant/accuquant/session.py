"""A calibration as steps, any of which may be the last of a process: ranges, blocks, window length, updates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_quant.accuquant.denoiser import Denoiser
from lightning_quant.accuquant.learning import Learner
from lightning_quant.accuquant.plan import DenoiserPlan
from lightning_quant.accuquant.ranges import activation_ranges, weight_ranges
from lightning_quant.accuquant.reconstruction import Reconstruction
from lightning_quant.accuquant.samplers import Sampler
from lightning_quant.accuquant.settings import Settings, usual_window, windows_of
from lightning_quant.accuquant.trajectories import Trajectories, device_of
from lightning_quant.accuquant.trajectory_cache import TrajectoryCache
from lightning_quant.accuquant.trajectory_errors import accumulated_errors
from lightning_quant.accuquant.windows import Window, network_calls, roll, window_loss
from lightning_quant.errors import CheckpointError, QuantizationError
from lightning_quant.nn.agreement import check_quantizers_agree
from lightning_quant.nn.evaluation import evaluating
from lightning_quant.nn.structure import quantizers_of

# Of the float trajectories, how many images and network calls ranges and blocks see.
RANGE_IMAGES, RANGE_CALLS = 16, 20
# The share of the network calls that a sweep gives to each length.
SWEEP_SHARE = 0.25
SWEPT = (1, 2, 5, 10, 20, 50, 100)
_START, _BLOCKS = "ranges", "blocks"


@dataclass(frozen=True)
class Source:
    """What a calibration works on.

    Attributes:
        denoiser: around the prepared network, quantizers in all slots.
        sampler: its steps.
        plan: what is quantized.
        cache: of float trajectories, which holds all images below.
        images: numbers of those to learn from.
        held_out: numbers of those that decide when to stop.
        rank: of this process, among ``ranks``.
        ranks: how many share the images.
    """

    denoiser: Denoiser
    sampler: Sampler
    plan: DenoiserPlan
    cache: TrajectoryCache
    images: range
    held_out: range
    rank: int = 0
    ranks: int = 1

    @property
    def network(self) -> nn.Module:
        """The denoiser's."""
        return self.denoiser.network

    @property
    def settings(self) -> Settings:
        """The plan's."""
        return self.plan.settings

    @property
    def steps(self) -> int:
        """Network calls of a trajectory: of PLMS one more than its steps."""
        return len(self.sampler.timesteps)

    def share(self, ids: list[int]) -> list[int]:
        """This rank's of some images."""
        return ids[self.rank :: self.ranks]

    def window(self, ids: list[int], steps: range) -> Trajectories:
        """The float trajectories over some steps, on the network's device."""
        return self.cache.window(ids, steps.start, steps.stop).to(device_of(self.network, torch.device("cpu")))


class Calibration:
    """Calibrates a denoiser step by step: ranges, then a block each, then window lengths, then updates.

    Each check keeps the best by the error that has piled up at the end of held-out trajectories, so that nothing worse
    than the beginning is ever returned.

    Args:
        source: network, plan and trajectories.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.errors: dict[str, Tensor] = {}
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

    # -- how far ------------------------------------------------------------------------------------------------------

    @property
    def candidates(self) -> list[int]:
        """Window lengths that are tried; none where one is given."""
        settings = self.source.settings
        if settings.window != "sweep":
            return []
        return sorted({usual_window(self.source.steps), *(length for length in SWEPT if length <= self.source.steps)})

    @property
    def window(self) -> int:
        """Steps in a window: given, usual, or the best of the sweep so far."""
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
        """How many steps there are, if no update is saved by stopping early."""
        return 1 + len(self.blocks) + len(self.candidates) + self.source.settings.updates

    @property
    def done(self) -> int:
        """How many steps are done."""
        if self.finished:
            return self.total
        return bool(self.errors) + len(self.blocks_done) + len(self.sweep) + self.updates

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self._committed

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self, advance: Callable[[str], None] = lambda name: None) -> str:
        """Do the next step; returns what was done, in a few words."""
        # Between Trainer loops this may be called in inference mode, whose tensors could not be learned.
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
        network = self.source.network
        activation_ranges(network, self._calls(_steps_to_see(self.source)))
        weight_ranges(network)
        check_quantizers_agree(network)
        self.errors[_START] = self.held_out_errors()
        if not self.source.settings.updates and not self.blocks:
            self._committed = True
        return "ranges"

    def _calls(self, steps: list[int]) -> list[Callable[[], object]]:
        """Calls of the network on float states, one for each of some steps."""
        ids = self.source.share(list(self.source.images)[:RANGE_IMAGES])
        return [partial(self._call, ids, k) for k in steps] if ids else []

    def _call(self, ids: list[int], k: int) -> Tensor:
        some = self.source.window(ids, range(k, k + 1))
        return self.source.denoiser(some.states[0], self.source.sampler.timesteps[k], some.conditioning)

    def replay(self) -> None:
        """Call the network on float states, at steps that are evenly spread."""
        for call in self._calls(_steps_to_see(self.source)):
            call()

    @property
    def _stage_a(self) -> Reconstruction:
        if self._reconstruction is None:
            source, steps = self.source, _steps_to_see(self.source)
            calls = [(call, source.sampler.timesteps[k]) for call, k in zip(self._calls(steps), steps, strict=False)]
            self._reconstruction = Reconstruction(source.network, source.plan, source.settings, calls, self._branches)
        return self._reconstruction

    @property
    def _branches(self) -> int:
        return 1 if self.source.denoiser.guidance is None else 2

    def _reconstruct(self, block: str) -> str:
        if not self.blocks_done:
            self._ranges = self._quantizers()
        self._stage_a.run(block)
        self.blocks_done.append(block)
        if len(self.blocks_done) == len(self.blocks):
            self._accept_blocks()
        return block

    def _accept_blocks(self) -> None:
        self.errors[_BLOCKS] = self.held_out_errors()
        if self.errors[_BLOCKS][-1] > self.errors[_START][-1]:
            self._load_quantizers(self._ranges)
            # A copy: files of safetensors hold no tensor under two names.
            self.errors[_BLOCKS] = self.errors[_START].clone()
        self._ranges = {}
        self._committed = not self.source.settings.updates

    def _try_length(self, length: int) -> str:
        """Learn for a while with windows of a length, and forget it."""
        settings = self.source.settings
        usual = usual_window(self.source.steps)
        calls = SWEEP_SHARE * settings.updates * network_calls(settings.adjoint, usual)
        learner = Learner(self.source.network, settings)
        updates = max(1, round(calls / network_calls(settings.adjoint, length)))
        for update in range(updates):
            self._learn(learner, length, update, updates)
        self.sweep[length] = float(self.held_out_errors()[-1])
        learner.cancel()
        return f"windows of {length}"

    def _update(self) -> str:
        settings = self.source.settings
        learner = self.learner
        if not self.checks:
            # Nothing has moved yet.
            self._look(learner, self.errors.get(_BLOCKS, self.errors[_START]))
        self.loss = self._learn(learner, self.window, self.updates, settings.updates)
        self.updates += 1
        last = self.updates == settings.updates
        self.worth_saving = last or self.updates % settings.check_every == 0
        if self.worth_saving:
            self._look(learner, self.held_out_errors())
            if last or self._stalled():
                learner.commit()
                check_quantizers_agree(self.source.network)
                self._committed, self._learner = True, None
        return f"update {self.updates}"

    @property
    def learner(self) -> Learner:
        """What learns; the quantizers are its leaves from here on."""
        if self._learner is None:
            self._learner = Learner(self.source.network, self.source.settings)
        return self._learner

    def _look(self, learner: Learner, errors: Tensor) -> None:
        if not self.checks or errors[-1] < min(self.checks.values()):
            learner.remember()
            # A state holds each tensor by itself.
            self.errors["end"] = errors.clone()
        self.checks[self.updates] = float(errors[-1])

    def _stalled(self) -> bool:
        """Whether the last checks, as many as the patience, brought nothing."""
        values = list(self.checks.values())
        return len(values) - 1 - values.index(min(values)) >= self.source.settings.patience

    # -- updates ------------------------------------------------------------------------------------------------------

    def _learn(self, learner: Learner, length: int, update: int, updates: int) -> float:
        """One update on a window and a batch that its number alone decides, over all ranks; rates fall to 0."""
        source, settings = self.source, self.source.settings
        steps, ids = _draw(settings, windows_of(source.steps, length), source.images, update)
        own = source.share(ids)
        share = self._window_loss(own, steps, total=len(ids)) if own else torch.zeros(())
        loss = learner.step(share, 1 - update / updates)
        if not math.isfinite(loss):
            raise QuantizationError(
                f"The loss of steps {steps.start} .. {steps.stop - 1} is {loss} at update {update}: lower"
                f" rounding_lr ({settings.rounding_lr}) or activation_lr ({settings.activation_lr})."
            )
        return loss

    def _window_loss(self, ids: list[int], steps: range, total: int) -> Tensor:
        source = self.source
        some = source.window(ids, steps)
        denoise = partial(_denoise, source.denoiser, some)
        window = replace(some.to_window(), total=total)
        if source.settings.start == "prefix" and steps.start:
            window = self._after_prefix(window, ids)
        return window_loss(denoise, source.sampler, window, source.settings.adjoint)

    def _after_prefix(self, window: Window, ids: list[int]) -> Window:
        """The window from the state that the quantized model itself reaches."""
        source = self.source
        before = source.window(ids, range(window.start))
        rollout = roll(partial(_denoise, source.denoiser, before), source.sampler, before.to_window())
        histories = (rollout.histories[-1], *window.histories[1:])
        return replace(window, x=rollout.states[-1], histories=histories)

    def held_out_errors(self) -> Tensor:
        """RMSE to the held-out float trajectories after each step, (steps + 1,), over all ranks."""
        source = self.source
        ids = source.share(list(source.held_out))
        trajectories = source.cache.trajectories(ids) if ids else None
        return accumulated_errors(source.denoiser, source.sampler, trajectories)

    # -- state --------------------------------------------------------------------------------------------------------

    def _quantizers(self) -> dict[str, Tensor]:
        states = ((name, quantizer.state_dict()) for name, quantizer in quantizers_of(self.source.network))
        return {f"{name}/{key}": value.detach().clone() for name, state in states for key, value in state.items()}

    def _load_quantizers(self, state: Mapping[str, Tensor]) -> None:
        for name, quantizer in quantizers_of(self.source.network):
            prefix = f"{name}/"
            quantizer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def state_dict(self) -> dict[str, Tensor]:
        """All that was computed, as tensors by flat names."""
        state = {f"fingerprint/{self.fingerprint()}": torch.tensor(True)}
        state["steps"] = torch.tensor([self.done, self.total])
        state["progress"] = torch.tensor([len(self.blocks_done), self.updates, int(self._committed)])
        state.update({f"error/{name}": value for name, value in self.errors.items()})
        state.update({f"sweep/{n}": torch.tensor(v, dtype=torch.float64) for n, v in self.sweep.items()})
        state.update({f"check/{n}": torch.tensor(v, dtype=torch.float64) for n, v in self.checks.items()})
        if self.errors:
            state.update({f"quantizer/{key}": value for key, value in self._quantizers().items()})
        state.update({f"ranges/{key}": value for key, value in self._ranges.items()})
        if self._learner is not None:
            state.update({f"learner/{key}": value for key, value in self._learner.state_dict().items()})
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: of another network, scheduler, or other settings.
        """
        if f"fingerprint/{self.fingerprint()}" not in state:
            raise CheckpointError(
                "The calibration that is to be continued was of another denoiser or scheduler, or had other settings:"
                " calibrate anew, without ckpt_path or with another cache_dir."
            )
        blocks, self.updates, committed = state["progress"].tolist()
        self.blocks_done, self._committed = self.blocks[:blocks], bool(committed)
        self.errors = {name: value.cpu() for name, value in _below(state, "error/").items()}
        self.sweep = {int(name): float(value) for name, value in _below(state, "sweep/").items()}
        self.checks = {int(name): float(value) for name, value in _below(state, "check/").items()}
        self._ranges = _below(state, "ranges/")
        if self.errors:
            self._load_quantizers(_below(state, "quantizer/"))
        learned = _below(state, "learner/")
        if learned:
            with torch.inference_mode(False):
                self.learner.load_state_dict(learned)

    def fingerprint(self) -> str:
        """Hash of the settings, of what is quantized, of the sampler and of the images."""
        source = self.source
        rows = [(row.name, row.kind, row.parts, row.left_out) for row in source.plan.rows]
        parts = (sorted(source.settings.as_dict().items()), rows, source.sampler.describe(), source.images)
        return hashlib.sha256(repr((*parts, source.held_out)).encode()).hexdigest()[:16]


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """Gradients flow through the parameters to the quantizers, not into them."""
    moving = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


def _denoise(denoiser: Denoiser, some: Trajectories, x: Tensor, t: int) -> Tensor:
    return denoiser(x, t, some.conditioning)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _steps_to_see(source: Source) -> list[int]:
    """Steps at which ranges are taken: evenly spread; all where each group of steps has its own."""
    steps = len(source.sampler.timesteps)
    if source.settings.activation_parameters == "per_group":
        return list(range(steps))
    return sorted({round(k) for k in torch.linspace(0, steps - 1, min(RANGE_CALLS, steps)).tolist()})


def _draw(settings: Settings, windows: list[range], images: range, update: int) -> tuple[range, list[int]]:
    """Window and images of an update: all windows in turn, in a new order each time round."""
    around, place = divmod(update, len(windows))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + around))
    drawn = torch.Generator().manual_seed(settings.seed * 1_000_003 + 500_000_009 + update)
    chosen = torch.randperm(len(images), generator=drawn)[: settings.batch_size]
    return windows[int(order[place])], [images[int(i)] for i in chosen]
