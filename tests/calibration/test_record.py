"""What a record says of a calibration, in whatever order its entries are."""

from __future__ import annotations

import pytest
import torch

from lightning_quant.calibration.record import begin_record, is_finished, numbered, plan_of, settings_of


@pytest.mark.parametrize(("done", "finished"), [(0, False), (4, False), (5, True)])
def test_it_is_finished_when_all_steps_are_done(done: int, finished: bool) -> None:
    assert is_finished(begin_record(done, 5, "", {})) == finished


def test_a_record_of_nothing_says_nothing() -> None:
    assert (is_finished({}), plan_of({}), settings_of({})) == (False, "", {})


def test_texts_are_kept_whatever_letters_they_have() -> None:
    record = begin_record(1, 1, "Größe 4 x 4", {"exclude": ["é"], "budget": None})
    assert (plan_of(record), settings_of(record)) == ("Größe 4 x 4", {"exclude": ["é"], "budget": None})


def test_numbers_are_sorted_as_numbers() -> None:
    record = {f"check/{n}": torch.tensor(n) for n in (100, 20, 3)}
    assert list(numbered(record, "check/")) == [3, 20, 100]
