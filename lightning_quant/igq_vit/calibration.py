"""A calibration as steps, any of which may be the last of a process: quantizers, perturbations, allocation."""

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
# Forward passes' worth of replays, beside the 12 or so of the estimates: 60 together.
REPLAYED_PASSES = 44


@dataclass(frozen=True)
class Source:
    """What a calibration works on.

    Attributes:
        network: attentions opened and layers swapped.
        plan: what to quantize.
        run: forward of the network, which lets gradients through where groups are allocated.
        inputs: calibration images of this rank.
        posteriors: from its outputs to log-probabilities (items, classes).
        images: fingerprint of the calibration images of all ranks, where states of other images are to be refused.
    """

    network: nn.Module
    plan: VitPlan
    run: Callable[[Tensor], Any]
    inputs: Tensor
    posteriors: Callable[[Any], Tensor]
    images: str = ""

    def forward(self) -> Any:
        """Outputs of all calibration images of this rank."""
        with torch.no_grad():
            return self.run(self.inputs)


class Calibration:
    """Calibrates a network step by step: all quantizers, estimates, perturbations of a layer each, then the groups.

    Args:
        source: network, plan and images.

    Attributes:
        candidates: quantizers of each slot, by number of groups.
        estimates: of the perturbations; those of a slot are empty where the network has no gradients.
        omega: the perturbations that were measured: all where there are no estimates, else those that may matter.
        groups: that were allocated.

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
        """The slots whose groups are chosen under the budget, in order."""
        if not self.source.plan.settings.allocates:
            return []
        inputs = [(name, INPUT) for name in self.source.plan.names("grouped")]
        return [*inputs, *((name, SOFTMAX) for name in self.source.plan.names("attention"))]

    @property
    def total(self) -> int:
        """How many steps there are."""
        return 1 + (len(self.allocated) + 2 if self.allocated else 0)

    @property
    def done(self) -> int:
        """How many steps are done."""
        return bool(self.candidates) + bool(self.estimates) + len(self.omega) + bool(self.allocated and self.groups)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.done == self.total

    def step(self, advance: Advance = lambda name: None) -> str:
        """Do the next step.

        Args:
            advance: called with the name of each module that the first step is done with.

        Returns:
            what was done, in a few words.
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
        """Call the network on the images that it was calibrated on."""
        self.source.forward()

    def _estimate(self) -> None:
        source, candidates = self.source, {slot: self.candidates[slot] for slot in self.allocated}
        with emptied(source.network, filled_slots(source.network)):
            found = estimated_perturbations(source.network, source.run, source.inputs, candidates, source.posteriors)
        if not found:
            rank_zero_warn(
                "The log-probabilities have no gradient, so that the perturbations of all numbers of groups are"
                " measured, which takes several times longer: let run and log_posteriors of IGQViT pass gradients."
            )
        self.estimates = {slot: found.get(slot, {}) for slot in candidates}

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
        """The numbers of groups to measure, of each slot: all where there are no estimates."""
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
        """The slots of each kind that there are, their costs, and the budget of all."""
        settings = self.source.plan.settings
        for kind, target in ((INPUT, settings.groups), (SOFTMAX, settings.row_groups)):
            slots, costs = self.costs(kind)
            if kind == INPUT and settings.budget is not None and slots:
                yield slots, costs, self.source.plan.input_budget()
            elif slots:
                yield slots, costs, budget_at(costs, target)

    def costs(self, kind: str) -> tuple[list[Slot], list[dict[int, int]]]:
        """The slots of a kind, and what each number of groups costs there: BOPs for inputs, 1 a group for softmax."""
        slots = [slot for slot in self.allocated if slot[1] == kind]
        if kind == SOFTMAX:
            return slots, [{groups: groups for groups in self.candidates[slot]} for slot in slots]
        plan = self.source.plan
        return slots, [{g: plan.layer_bops(name, g) for g in self.candidates[name, INPUT]} for name, _ in slots]

    # -- state ----------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Tensor]:
        """What a report shows: the plan, ``estimate/``, ``omega/``, ``cost/`` and ``groups/`` of each slot."""
        plan = self.source.plan
        found = begin_record(self.done, self.total, plan, plan.settings.as_dict())
        for kind, tables in ((ESTIMATE, self.estimates), (OMEGA, self.omega)):
            found.update({f"{kind}{name}.{slot}": table(values) for (name, slot), values in tables.items()})
        for slots, costs in map(self.costs, (INPUT, SOFTMAX) if self.omega else ()):
            found.update({f"{COST}{name}.{slot}": table(each) for (name, slot), each in zip(slots, costs, strict=True)})
        for (name, slot), groups in self.groups.items():
            found[f"{GROUPS}{name}.{slot}"] = torch.tensor(groups)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """All that was computed, as tensors by flat names."""
        state = {f"fingerprint/{self.fingerprint()}": torch.tensor(True), **self.record()}
        for name, quantizer in quantizers_of(self.source.network):
            state.update(_write(f"filled/{name}", quantizer))
        for (name, slot), quantizers in self.candidates.items():
            for groups, quantizer in quantizers.items():
                state.update(_write(f"candidate/{name}.{slot}/{groups}", quantizer))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: of another network, other settings or other images.
        """
        if f"fingerprint/{self.fingerprint()}" not in state:
            raise CheckpointError(
                "The calibration that is to be continued was of another network, other settings or other images:"
                " calibrate anew, without ckpt_path or with another cache_dir."
            )
        for key, quantizer in _read(state, "filled/").items():
            fill(self.source.network, {_slot(key): quantizer})
        for key, quantizer in _read(state, "candidate/").items():
            path, _, groups = key.rpartition("/")
            self.candidates.setdefault(_slot(path), {})[int(groups)] = quantizer
        self.candidates = {slot: dict(sorted(quantizers.items())) for slot, quantizers in self.candidates.items()}
        estimates, omega, chosen = tables_of(state, ESTIMATE), tables_of(state, OMEGA), groups_of(state)
        # A file may give names back in another order than that of the network.
        paths = {slot: f"{slot[0]}.{slot[1]}" for slot in self.allocated}
        self.estimates = {slot: estimates[path] for slot, path in paths.items() if path in estimates}
        self.omega = {slot: omega[path] for slot, path in paths.items() if path in omega}
        self.groups = {slot: chosen[path] for slot, path in paths.items() if path in chosen}
        if self.omega and not self.estimates:
            # Of a version that measured all.
            self.estimates = {slot: {} for slot in self.allocated}

    def fingerprint(self) -> str:
        """Hash of the settings, of what is quantized, and of the images."""
        rows = [(row.name, row.kind, row.role) for row in self.source.plan.rows]
        parts = (sorted(self.source.plan.settings.as_dict().items()), rows, self.source.images)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _slot(path: str) -> Slot:
    name, _, slot = path.rpartition(".")
    return name, slot


def _write(prefix: str, quantizer: Quantizer) -> dict[str, Tensor]:
    # Copies: one quantizer may stand in a slot and among the candidates, and a file holds no tensor twice.
    return {f"{prefix}/{key}": value.detach().clone() for key, value in quantizer.state_dict().items()}


def _read(state: Mapping[str, Tensor], prefix: str) -> dict[str, Quantizer]:
    """Quantizers by path, of keys ``prefix path / buffer``."""
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
