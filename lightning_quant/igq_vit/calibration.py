"""Stepwise calibration that can be interrupted after any step: quantizers, perturbations, allocation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_quant.calibration.record import begin_record
from lightning_quant.errors import CheckpointError
from lightning_quant.igq_vit.allocation import allocate, budget_at
from lightning_quant.igq_vit.calibration_pass import Advance, Slot, calibrate, emptied, fill, filled_slots
from lightning_quant.igq_vit.perturbation import Replay, perturbations
from lightning_quant.igq_vit.plan import VitPlan
from lightning_quant.igq_vit.records import COST, ESTIMATE, GROUPS, OMEGA, groups_of, table, tables_of
from lightning_quant.igq_vit.schemes import Candidates
from lightning_quant.igq_vit.sensitivity import estimated_perturbations
from lightning_quant.igq_vit.shortlist import combined, expected_gains, shortlist
from lightning_quant.nn.agreement import check_quantizers_agree
from lightning_quant.nn.modes import evaluating
from lightning_quant.nn.structure import quantizers_of
from lightning_quant.quantizers import Quantizer
from lightning_quant.quantizers.base import quantizer_of_state

INPUT, SOFTMAX = "input_quantizer", "softmax_quantizer"
# Cost limit of all replays, in forward passes; about 60 together with the 12 or so of the estimates.
REPLAYED_PASSES = 44


@dataclass(frozen=True)
class Source:
    """Network, plan and images of a calibration.

    Attributes:
        network: Network with swapped attentions and layers.
        plan: Plan of what to quantize.
        run: Forward of the network. Gradients should flow through it if groups are allocated.
        inputs: Calibration images of this rank.
        posteriors: Function from outputs to log-probabilities (items, classes).
        images: Fingerprint of the calibration images of all ranks, by which states from other images are refused; empty
            if it does not matter.
    """

    network: nn.Module
    plan: VitPlan
    run: Callable[[Tensor], Any]
    inputs: Tensor
    posteriors: Callable[[Any], Tensor]
    images: str = ""

    def forward(self) -> Any:
        """Run the network on all calibration images of this rank, without gradients."""
        with torch.no_grad():
            return self.run(self.inputs)


class Calibration:
    """Stepwise calibration: all quantizers, estimates of perturbations, one layer's perturbations per step, the groups.

    Args:
        source: Network, plan and images.

    Attributes:
        candidates: Quantizers of each slot, keyed by number of groups.
        estimates: Estimated perturbations of each slot, keyed by number of groups; empty if the network has no
            gradients.
        omega: Measured perturbations of each slot, keyed by number of groups: all of them without estimates, otherwise
            those that may change the allocation.
        groups: Allocated number of groups of each slot.

    Example:
        >>> import timm
        >>> from lightning_quant.igq_vit.perturbation import log_posteriors
        >>> from lightning_quant.igq_vit.preparation import prepare
        >>> from lightning_quant.igq_vit.settings import Settings
        >>> network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
        >>> images = torch.randn(4, 3, 32, 32)
        >>> settings = Settings(groups=4, allocate=False, calibration_images=4)
        >>> plan = prepare(network, settings, images[:1], network)
        >>> calibration = Calibration(Source(network, plan, network, images, log_posteriors))
        >>> calibration.step(), calibration.finished
        ('quantizers', True)
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.candidates: dict[Slot, Candidates] = {}
        self.estimates: dict[Slot, dict[int, float]] = {}
        self.omega: dict[Slot, dict[int, float]] = {}
        self.groups: dict[Slot, int] = {}
        self._replay: Replay | None = None
        self._shortlist: dict[Slot, list[int]] = {}

    # -- steps ----------------------------------------------------------------------------------------------------

    @property
    def allocated(self) -> list[Slot]:
        """Slots whose number of groups is chosen under the budget, in order."""
        if not self.source.plan.settings.allocates:
            return []
        inputs = [(name, INPUT) for name in self.source.plan.names("grouped")]
        return [*inputs, *((name, SOFTMAX) for name in self.source.plan.names("attention"))]

    @property
    def total(self) -> int:
        """Total number of steps."""
        return 1 + (len(self.allocated) + 2 if self.allocated else 0)

    @property
    def done(self) -> int:
        """Number of completed steps."""
        return bool(self.candidates) + bool(self.estimates) + len(self.omega) + bool(self.allocated and self.groups)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done == self.total

    def step(self, advance: Advance = lambda name: None) -> str:
        """Run the next step.

        Args:
            advance: Function that the first step calls with the name of each module that it has finished.

        Returns:
            Description of the step in a few words.
        """
        with evaluating(self.source.network):
            if not self.candidates:
                self.candidates = calibrate(self.source.network, self.source.plan, self.source.forward, advance)
                check_quantizers_agree(self.source.network)
                return "quantizers"
            if not self.estimates:
                self._estimate()
                return "estimates of perturbations"
            missing = [slot for slot in self.allocated if slot not in self.omega]
            if missing:
                self.omega[missing[0]] = self._perturb(missing[0])
                return f"perturbation of {missing[0][0]}"
            self._allocate()
            return "allocation"

    def replay(self) -> None:
        """Run the network on its calibration images."""
        self.source.forward()

    def _estimate(self) -> None:
        source, candidates = self.source, {slot: self.candidates[slot] for slot in self.allocated}
        with emptied(source.network, filled_slots(source.network)):
            estimates = estimated_perturbations(
                source.network, source.run, source.inputs, candidates, source.posteriors
            )
        if not estimates:
            rank_zero_warn(
                "The log-probabilities have no gradient, so the perturbations of all numbers of groups have to be"
                " measured, which takes several times longer. Let gradients flow through run and log_posteriors of"
                " IGQViT."
            )
        self.estimates = {slot: estimates.get(slot, {}) for slot in candidates}

    def _perturb(self, slot: Slot) -> dict[int, float]:
        source = self.source
        with emptied(source.network, filled_slots(source.network)):
            if self._replay is None:
                self._replay = Replay(source.network, source.forward, [name for name, _ in self.allocated])
                self._shortlist = self._shortlisted(self._replay)
            reference = source.posteriors(self._replay.outputs)
            chosen = {groups: self.candidates[slot][groups] for groups in self._shortlist[slot]}
            return perturbations(self._replay, reference, slot, chosen, source.posteriors)

    def _shortlisted(self, replay: Replay) -> dict[Slot, list[int]]:
        """Choose the numbers of groups to measure for each slot; all of them without estimates."""
        if not all(self.estimates.values()):
            return {slot: list(self.candidates[slot]) for slot in self.allocated}
        gains = []
        for slots, costs, budget in self._problems():
            gains += expected_gains([self.estimates[slot] for slot in slots], costs, budget)
        passes = [replay.share(name) for name, _ in self.allocated]
        return dict(zip(self.allocated, shortlist(gains, passes, REPLAYED_PASSES), strict=True))

    def _allocate(self) -> None:
        self._replay = None
        for slots, costs, budget in self._problems():
            omega = [combined(self.estimates[slot], self.omega[slot]) for slot in slots]
            self.groups.update(zip(slots, allocate(omega, costs, budget), strict=True))
        fill(self.source.network, {slot: self.candidates[slot][groups] for slot, groups in self.groups.items()})
        check_quantizers_agree(self.source.network)

    def _problems(self) -> Iterator[tuple[list[Slot], list[dict[int, int]], int]]:
        """Yield the slots of each kind, their costs and their budget; kinds without slots are skipped."""
        settings = self.source.plan.settings
        for kind, target in ((INPUT, settings.groups), (SOFTMAX, settings.row_groups)):
            slots, costs = self.costs(kind)
            if kind == INPUT and settings.budget is not None and slots:
                yield slots, costs, self.source.plan.input_budget()
            elif slots:
                yield slots, costs, budget_at(costs, target)

    def costs(self, kind: str) -> tuple[list[Slot], list[dict[int, int]]]:
        """Return the slots of a kind and their costs by number of groups: BOPs for inputs, groups for softmax."""
        slots = [slot for slot in self.allocated if slot[1] == kind]
        if kind == SOFTMAX:
            return slots, [{groups: groups for groups in self.candidates[slot]} for slot in slots]
        plan = self.source.plan
        return slots, [{g: plan.layer_bops(name, g) for g in self.candidates[name, INPUT]} for name, _ in slots]

    # -- state ----------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Tensor]:
        """Return the record for the report: plan, ``estimate/``, ``omega/``, ``cost/`` and ``groups/`` of each slot."""
        plan = self.source.plan
        record = begin_record(self.done, self.total, plan, plan.settings.as_dict())
        for kind, tables in ((ESTIMATE, self.estimates), (OMEGA, self.omega)):
            record.update({f"{kind}{name}.{slot}": table(values) for (name, slot), values in tables.items()})
        for slots, costs in map(self.costs, (INPUT, SOFTMAX) if self.omega else ()):
            record.update(
                {f"{COST}{name}.{slot}": table(by_groups) for (name, slot), by_groups in zip(slots, costs, strict=True)}
            )
        for (name, slot), groups in self.groups.items():
            record[f"{GROUPS}{name}.{slot}"] = torch.tensor(groups)
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that was computed, as tensors with flat names."""
        state = {f"fingerprint/{self.fingerprint()}": torch.tensor(True), **self.record()}
        for name, quantizer in quantizers_of(self.source.network):
            state.update(_write(f"filled/{name}", quantizer))
        for (name, slot), quantizers in self.candidates.items():
            for groups, quantizer in quantizers.items():
                state.update(_write(f"candidate/{name}.{slot}/{groups}", quantizer))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a state.

        Raises:
            CheckpointError: State of another network, other settings or other images.
        """
        if f"fingerprint/{self.fingerprint()}" not in state:
            raise CheckpointError(
                "The calibration to resume belongs to another network, other settings or other images: calibrate again,"
                " without ckpt_path or with another cache_dir."
            )
        for key, quantizer in _read(state, "filled/").items():
            fill(self.source.network, {_slot(key): quantizer})
        for key, quantizer in _read(state, "candidate/").items():
            path, _, groups = key.rpartition("/")
            self.candidates.setdefault(_slot(path), {})[int(groups)] = quantizer
        self.candidates = {slot: dict(sorted(quantizers.items())) for slot, quantizers in self.candidates.items()}
        estimates, omega, chosen = tables_of(state, ESTIMATE), tables_of(state, OMEGA), groups_of(state)
        # A file may return names in another order than the network's.
        paths = {slot: f"{slot[0]}.{slot[1]}" for slot in self.allocated}
        self.estimates = {slot: estimates[path] for slot, path in paths.items() if path in estimates}
        self.omega = {slot: omega[path] for slot, path in paths.items() if path in omega}
        self.groups = {slot: chosen[path] for slot, path in paths.items() if path in chosen}
        if self.omega and not self.estimates:
            # Written by a version that measured all perturbations.
            self.estimates = {slot: {} for slot in self.allocated}

    def fingerprint(self) -> str:
        """Hash the settings, the quantized modules and the images."""
        rows = [(row.name, row.kind, row.role) for row in self.source.plan.rows]
        parts = (sorted(self.source.plan.settings.as_dict().items()), rows, self.source.images)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _slot(path: str) -> Slot:
    name, _, slot = path.rpartition(".")
    return name, slot


def _write(prefix: str, quantizer: Quantizer) -> dict[str, Tensor]:
    # Copies, because a quantizer may be both in a slot and a candidate, and a file cannot hold a tensor twice.
    return {f"{prefix}/{key}": value.detach().clone() for key, value in quantizer.state_dict().items()}


def _read(state: Mapping[str, Tensor], prefix: str) -> dict[str, Quantizer]:
    """Rebuild quantizers, keyed by path, from entries named ``{prefix}{path}/{buffer}``."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith(prefix):
            path, _, buffer = key.removeprefix(prefix).rpartition("/")
            parts.setdefault(path, {})[buffer] = value
    quantizers = {}
    for path, tensors in parts.items():
        quantizer = quantizer_of_state(tensors["_extra_state"])
        device = next((t.device for k, t in tensors.items() if k != "_extra_state"), None)
        quantizer.to(device).load_state_dict(tensors)
        quantizers[path] = quantizer
    return quantizers
