"""What is said before a calibration starts."""

from pathlib import Path
from typing import Any

import pytest

from helpers.small_diffusion import SHAPE, SMALL, parts, started
from lightning_quant.accuquant.plan import DenoiserPlan
from lightning_quant.accuquant.preparation import BACKWARD, FORWARD, estimate, image_numbers, sampler_for
from lightning_quant.accuquant.reconstruction import BATCH as BLOCK_BATCH
from lightning_quant.accuquant.settings import Settings

# A float call of a batch takes as long as makes minutes of it all.
SECONDS = 100.0
FEW_CHECKS = {"check_every": 600, "held_out": 1}


def said(seconds: float = SECONDS, ranks: int = 1, **settings: Any) -> str:
    chosen = Settings(**{**SMALL, "updates": 600, **settings})
    return estimate(DenoiserPlan((), chosen), sampler_for(parts(), chosen), SHAPE, seconds, ranks)


@pytest.mark.parametrize(
    ("adjoint", "calls"), [("identity", FORWARD + 2 * BACKWARD), ("bptt", 2 * BACKWARD), ("per_step", 2 * BACKWARD)]
)
def test_updates_take_their_forwards_and_backwards(adjoint: str, calls: float) -> None:
    # Beside the updates two checks, and single steps twice, each of 6 steps of a quarter of a batch.
    hours = (600 * calls + 4 * 6 / 4 * FORWARD) * SECONDS / 3600
    assert f"600 updates of 4 images, {hours:.1f} h" in said(adjoint=adjoint, **FEW_CHECKS)


def test_only_full_back_propagation_keeps_the_graphs_of_a_window() -> None:
    assert "in the memory of 1 network call with" in said()
    assert "in the memory of 2 network calls with" in said(adjoint="bptt")


def test_block_reconstruction_has_its_time_where_there_is_any() -> None:
    assert "iterations on each block" not in said()
    hours = 50 * BLOCK_BATCH / 4 * BACKWARD * SECONDS / 3600
    assert f"exist already; 50 iterations on each block, {hours:.1f} h; 600 updates" in said(reconstruction=50)


def test_ranks_share_the_time() -> None:
    assert "float trajectories of 12 images, 30 min" in said()
    assert "float trajectories of 12 images, 15 min" in said(ranks=2)


def test_plan_and_estimate_are_printed_before_the_trajectories_are_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started(tmp_path)
    assert "AccuQuant: 4 layers to W3A6" in caplog.text
    assert "Calibration over windows of 2 of 6 steps, identity gradient" in caplog.text


def test_images_that_decide_are_not_among_those_to_learn_from() -> None:
    learned, held = image_numbers(Settings(trajectories=8, held_out=4))
    assert (learned, held) == (range(8), range(8, 12))
