"""A calibration as steps: it never ends worse, can be stopped anywhere, and ranks agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.processes import on_ranks
from helpers.small_diffusion import SMALL, finished, parts, started
from lightning_quant.accuquant.calibration import Calibration
from lightning_quant.accuquant.preparation import image_numbers, sampler_for
from lightning_quant.accuquant.ranges import prepare
from lightning_quant.accuquant.settings import Settings
from lightning_quant.accuquant.source import Source
from lightning_quant.calibration.record import below, is_finished, plan_of, settings_of
from lightning_quant.errors import CheckpointError, QuantizationError
from lightning_quant.nn.structure import quantizers_of


def quantizers(calibration: Calibration) -> dict[str, Tensor]:
    found = quantizers_of(calibration.source.network)
    return {f"{name}.{key}": value for name, q in found for key, value in q.state_dict().items()}


def assert_equal(one: Calibration, other: Calibration) -> None:
    left, right = quantizers(one), quantizers(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_updates_bring_the_end_of_held_out_trajectories_nearer(tmp_path: Path) -> None:
    calibration = finished(started(tmp_path, updates=40, rounding_lr=2e-2, activation_lr=2e-3))
    assert calibration.errors["end"][-1] < 0.95 * calibration.errors["ranges"][-1]
    assert float(calibration.source.held_out_errors()[-1]) == pytest.approx(
        float(calibration.errors["end"][-1]), rel=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"updates": 0, "reconstruction": 4}, {"updates": 0}])
def test_its_record_has_both_errors_over_the_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    calibration = finished(started(tmp_path, **options))
    record = calibration.record()
    accumulated, single = below(record, "error/"), below(record, "single_step/")
    assert list(single) == list(dict.fromkeys(["ranges", list(accumulated)[-1]]))
    for stage, errors in single.items():
        assert len(errors) == SMALL["steps"]
        # From the noise both take the same step; later ones accumulate.
        assert float(errors[0]) == pytest.approx(float(accumulated[stage][1]), rel=1e-5)
        assert float(errors[-1]) < float(accumulated[stage][-1])
    assert is_finished(record)
    assert plan_of(record) == str(calibration.source.plan)
    assert settings_of(record)["weight_bits"] == SMALL["weight_bits"]
    # It is in every checkpoint: without quantizers.
    assert sum(value.nbytes for value in record.values()) < 5000


@pytest.mark.parametrize("options", [{}, {"reconstruction": 4, "activation_parameters": "per_group"}])
def test_before_any_update_it_is_bit_for_bit_what_it_was(tmp_path: Path, options: dict[str, Any]) -> None:
    """The first look at the held-out trajectories is therefore the last one of the stage before."""
    calibration = started(tmp_path, weight_scales=True, **options)
    while len(calibration.blocks_done) < len(calibration.blocks) or not calibration.errors:
        calibration.step()
    before = calibration.source.held_out_errors()
    calibration.learner.release()
    assert torch.equal(calibration.source.held_out_errors(), before)
    calibration.step()
    assert calibration.checks[0] == float(before[-1])


@pytest.mark.parametrize("rate", [3e-3, 3.0])
def test_it_never_ends_worse_than_it_began(tmp_path: Path, rate: float) -> None:
    calibration = finished(started(tmp_path, rounding_lr=rate, activation_lr=rate))
    assert calibration.source.held_out_errors()[-1] <= calibration.errors["ranges"][-1] * (1 + 1e-5)


def test_blocks_that_make_it_worse_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = started(tmp_path, reconstruction=4, updates=0)
    calibration.step()
    before, errors = quantizers(calibration), calibration.source.held_out_errors()
    monkeypatch.setattr(Source, "held_out_errors", lambda self: errors + 1)
    finished(calibration)
    assert all(torch.equal(value, before[key]) for key, value in quantizers(calibration).items())
    save_file(calibration.state_dict(), tmp_path / "state.safetensors")
    assert torch.equal(load_file(tmp_path / "state.safetensors")["error/blocks"], errors)


def test_it_stops_when_nothing_is_gained_any_more(tmp_path: Path) -> None:
    calibration = finished(
        started(tmp_path, rounding_lr=30.0, activation_lr=3.0, updates=40, check_every=1, patience=3)
    )
    assert calibration.updates < 40
    values = list(calibration.checks.values())
    assert min(values) < min(values[-3:])
    assert calibration.done == calibration.total


# Stops early after more than ten looks.
LONG: dict[str, Any] = {"updates": 40, "check_every": 1, "patience": 6}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "options", [{}, LONG, {"window": "sweep"}, {"reconstruction": 4}, {"activation_parameters": "per_group"}]
)
def test_stopped_after_any_step_it_goes_on_to_the_same_end(
    tmp_path: Path, options: dict[str, Any], backwards: bool
) -> None:
    """A file gives the names of a state back sorted as text; the order of a state means nothing."""
    whole = finished(started(tmp_path, **options))
    assert "patience" not in options or 10 < whole.updates < 40
    running = started(tmp_path, **options)
    while not running.finished:
        state = {key: value.clone() for key, value in sorted(running.state_dict().items(), reverse=backwards)}
        again = started(tmp_path, **options)
        again.load_state_dict(state)
        assert again.done == running.done
        assert list(again.record()) == list(running.record())
        running = again
        running.step()
    assert_equal(running, whole)
    assert list(running.record()) == list(whole.record())
    assert running.checks == whole.checks


def test_each_step_is_counted(tmp_path: Path) -> None:
    calibration = started(tmp_path, window="sweep", reconstruction=2)
    assert calibration.total == 1 + len(calibration.blocks) + len(calibration.candidates) + SMALL["updates"]
    for done in range(calibration.total):
        assert calibration.done == done
        calibration.step()
    assert calibration.finished


def test_the_sweep_takes_the_length_with_the_least_error(tmp_path: Path) -> None:
    calibration = finished(started(tmp_path, window="sweep", updates=12))
    assert list(calibration.sweep) == calibration.candidates == [1, 2, 4, 5]
    assert calibration.sweep[calibration.window] == min(calibration.sweep.values())


def test_the_same_settings_give_the_same_bits(tmp_path: Path) -> None:
    assert_equal(finished(started(tmp_path)), finished(started(tmp_path)))


def test_nothing_learned_leaves_the_ranges(tmp_path: Path) -> None:
    calibration = finished(started(tmp_path, updates=0))
    assert calibration.total == calibration.done == 1
    assert list(calibration.errors) == ["ranges"]


@pytest.mark.parametrize(("learn", "moves"), [("rounding", "codes"), ("activations", "scale")])
def test_only_what_is_to_be_learned_moves(tmp_path: Path, learn: str, moves: str) -> None:
    before = finished(started(tmp_path, updates=0))
    after = finished(started(tmp_path, learn=learn, updates=40, rounding_lr=5e-2, activation_lr=3e-3))
    kinds = {"codes": "weight_quantizer.codes", "scale": "input_quantizer.scale"}
    new = quantizers(after)
    changed = {name for name, value in quantizers(before).items() if not torch.equal(value, new[name])}
    assert any(kinds[moves] in name for name in changed)
    assert not any(kinds[other] in name for other in kinds if other != moves for name in changed)


def test_the_weights_of_the_network_stay(tmp_path: Path) -> None:
    calibration = started(tmp_path)
    before = {name: p.clone() for name, p in calibration.source.network.named_parameters()}
    finished(calibration)
    for name, parameter in calibration.source.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


def test_a_prefix_starts_where_the_quantized_model_is(tmp_path: Path) -> None:
    one, other = (finished(started(tmp_path, start=start, updates=10)) for start in ("float", "prefix"))
    assert any(not torch.equal(value, quantizers(other)[name]) for name, value in quantizers(one).items())


def test_a_multistep_sampler_is_calibrated(tmp_path: Path) -> None:
    calibration = finished(started(tmp_path, PNDMScheduler(skip_prk_steps=True), updates=20))
    assert calibration.source.steps == SMALL["steps"] + 1
    assert calibration.errors["end"][-1] < calibration.errors["ranges"][-1]


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    state = started(tmp_path).state_dict()
    with pytest.raises(CheckpointError, match="other settings: calibrate anew"):
        started(tmp_path, weight_bits=4).load_state_dict(state)


def test_a_loss_that_is_no_number_stops_it(tmp_path: Path) -> None:
    calibration = started(tmp_path)
    calibration.step()
    torch.nn.init.constant_(calibration.source.network.last.bias, torch.nan)  # type: ignore[arg-type, union-attr]
    with pytest.raises(QuantizationError, match=r"The loss of steps \d .. \d is nan at update 0: lower rounding_lr"):
        calibration.step()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_find_what_one_finds(ranks: int, tmp_path: Path) -> None:
    settings = Settings(**{**SMALL, "held_out": 3, "trajectories": 7, "batch_size": 3})
    whole = finished(started(tmp_path, held_out=3, trajectories=7, batch_size=3))
    cache, plan = whole.source.cache, whole.source.plan
    expected = quantizers(whole)

    def on_rank(rank: int, ranks: int) -> tuple[dict[str, Any], list[float]]:
        own = parts()
        prepare(own.denoiser.network, plan)
        images, held = image_numbers(settings)
        source = Source(own.denoiser, sampler_for(own, settings), plan, cache, images, held, rank, ranks)
        calibration = finished(Calibration(source))
        # Tensors would be handed over as open files.
        return {name: q.tolist() for name, q in quantizers(calibration).items()}, list(calibration.checks.values())

    (first, checks), *others = on_ranks(ranks, on_rank)
    assert all(other == (first, checks) for other in others)
    assert checks == pytest.approx(list(whole.checks.values()), rel=2e-3)
    for name, value in first.items():
        torch.testing.assert_close(torch.tensor(value).float(), expected[name].float(), rtol=1e-3, atol=1e-6)
