"""What is said before a calibration: both numbers of passes, and the switch between them."""

from __future__ import annotations

import re

from helpers.vits import calibration, images, vit
from lightning_quant.igq_vit.summary import estimate


def said(**settings: bool) -> str:
    return estimate(calibration(vit(), images(8), **settings).source.plan, seconds=1.0, images=8)


def test_the_estimate_says_what_allocation_costs_and_how_to_do_without() -> None:
    without, allocated = said(allocate=False), said()
    assert "about 15 forward passes over them, 2 min, and about" in without
    assert "allocate" not in without
    found = re.search(r"about (\d+) forward passes over them, .* \(allocate=False: 15, 2 min\)", allocated)
    assert found is not None
    # Fitting each number of groups, and at most 60 passes for the perturbations.
    assert 70 < int(found[1]) <= 70 + 60
