"""Trajectories on disk: those that would have been generated, once, by any number of ranks, and of nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

from helpers.processes import on_ranks
from helpers.rollouts import KINDS, SHAPE, fake, sampler
from lightning_quant.accuquant import trajectory_cache, trajectory_files
from lightning_quant.accuquant.trajectories import Trajectories, generate, trajectory_bytes
from lightning_quant.accuquant.trajectory_cache import TrajectoryCache
from lightning_quant.accuquant.trajectory_files import DESCRIPTION
from lightning_quant.data.noise import initial_noise
from lightning_quant.errors import CheckpointError, ConfigurationError, QuantizationError
from lightning_quant.nn import swap
from lightning_quant.nn.structure import weights_hash
from lightning_quant.quantizers import FixedQuantizer

IDS = range(10)


def labels(ids: Any = IDS) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.tensor(list(ids)) % 4}


def ensured(folder: Path, denoiser: Any = None, kind: str = "ddim", ids: Any = IDS, **changes: Any) -> TrajectoryCache:
    arguments = {"conditioning": labels(ids), "ids": ids, "shape": SHAPE, "seed": 1} | changes
    cache = TrajectoryCache(folder, chunk=4)
    cache.ensure(denoiser or fake(), arguments.pop("sampler", None) or sampler(kind), **arguments)
    return cache


def direct(kind: str, ids: Any = IDS) -> Trajectories:
    x = initial_noise(SHAPE, ids, seed=1)
    return generate(fake(), sampler(kind), x, labels(ids), ids, 1, keep=True)


def chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_equal(found: Trajectories, expected: Trajectories) -> None:
    assert torch.equal(found.states, expected.states)
    assert (found.outputs is None) == (expected.outputs is None)
    if found.outputs is not None and expected.outputs is not None:
        assert torch.equal(found.outputs, expected.outputs)
    assert found.conditioning.keys() == expected.conditioning.keys()
    assert all(torch.equal(rows, expected.conditioning[name]) for name, rows in found.conditioning.items())
    assert torch.equal(found.ids, expected.ids)
    assert (found.seed, found.stochastic, found.start) == (expected.seed, expected.stochastic, expected.start)
    for one, other in zip(found.histories, expected.histories, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_generated(kind: str, tmp_path: Path) -> None:
    cache = ensured(tmp_path, kind=kind)
    assert_equal(cache.trajectories(IDS), direct(kind))
    assert_equal(cache.trajectories([9, 2, 5]), direct(kind).batch(torch.tensor([9, 2, 5])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 6), (1, 3), (5, 6)])
def test_a_window_is_that_of_the_whole(kind: str, start: int, stop: int, tmp_path: Path) -> None:
    cache, rows = ensured(tmp_path, kind=kind), [7, 1, 4]
    assert_equal(
        cache.window(rows, start, stop), direct(kind).window(start, stop, sampler(kind)).batch(torch.tensor(rows))
    )


def test_a_window_reads_no_other_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, read = ensured(tmp_path, kind="plms", sampler=sampler("plms", steps=20)), list[tuple[str, int]]()
    original = trajectory_files.read_row

    def spy(path: Path, name: str, row: int, start: int, stop: int) -> torch.Tensor:
        read.extend((name, k) for k in range(start, stop))
        return original(path, name, row, start, stop)

    monkeypatch.setattr(trajectory_cache, "read_row", spy)
    cache.window([3], 10, 12)
    assert {k for name, k in read if name == "states"} == {10, 11, 12}
    # Three before each of the two steps.
    assert {k for name, k in read if name == "outputs"} == {7, 8, 9, 10}
    assert len(read) == len(set(read))


def test_a_second_time_nothing_is_generated(tmp_path: Path) -> None:
    ensured(tmp_path)
    denoiser, seen = fake(), list[int]()
    cache = TrajectoryCache(tmp_path, chunk=4)
    assert cache.ensure(denoiser, sampler(), labels(), IDS, SHAPE, 1, progress=seen.append) == 0
    assert denoiser.batches == []
    assert sum(seen) == 10 * 6
    assert_equal(cache.trajectories(IDS), direct("ddim"))


@pytest.mark.parametrize("kind", ["ddpm", "plms"])
@pytest.mark.parametrize("calls", [0, 5, 13])
def test_stopped_anywhere_it_goes_on_at_the_missing_files(kind: str, calls: int, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(images: int) -> None:
        if len(counted) == calls:
            raise Stop
        counted.append(images)

    counted, steps = list[int](), len(sampler(kind).timesteps)
    with pytest.raises(Stop):
        ensured(tmp_path, kind=kind, progress=stop)
    assert len(chunks(tmp_path)) == calls // steps
    assert not list(tmp_path.glob("*.tmp"))
    denoiser, seen = fake(), list[int]()
    cache = ensured(tmp_path, denoiser, kind, progress=seen.append)
    assert denoiser.batches == [size for size in (4, 4, 2) for _ in range(steps)][calls // steps * steps :]
    assert sum(seen) == 10 * steps
    assert_equal(cache.trajectories(IDS), direct(kind))


def test_nan_leaves_the_files_before_it_and_names_the_step(tmp_path: Path) -> None:
    broken = fake(broken=sampler().timesteps[2])
    with pytest.raises(QuantizationError, match=r"NaN at step 2 .*, for the images 3\."):
        ensured(tmp_path, broken)
    assert chunks(tmp_path) == []


def test_batches_within_a_file_change_nothing(tmp_path: Path) -> None:
    denoiser = fake()
    cache = ensured(tmp_path, denoiser, batch=3)
    assert denoiser.batches == [size for size in (3, 1, 3, 1, 2) for _ in range(6)]
    assert_equal(cache.trajectories(IDS), direct("ddim"))


def test_more_images_and_others_beside_them(tmp_path: Path) -> None:
    cache = ensured(tmp_path, ids=range(8))
    denoiser = fake()
    assert cache.ensure(denoiser, sampler(), labels(range(12)), range(12), SHAPE, 1) == 4
    assert cache.ensure(denoiser, sampler(), labels([100, 90]), [100, 90], SHAPE, 1) == 2
    both = cache.trajectories([90, 3, 11])
    assert_equal(both, direct("ddim", [90, 3, 11]))


def test_other_conditioning_is_not_taken_for_this_one(tmp_path: Path) -> None:
    ensured(tmp_path)
    changed = labels()
    changed["class_labels"][5] += 1
    denoiser = fake()
    found = ensured(tmp_path, denoiser, conditioning=changed).trajectories([5, 9])
    assert denoiser.batches == [4] * 6
    expected = direct("ddim").states[:, [5, 9]]
    assert not torch.equal(found.states[:, 0], expected[:, 0])
    assert torch.equal(found.states[:, 1], expected[:, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": {"weight": 0.7}}, r"\(model [0-9a-f]{12} there, [0-9a-f]{12} here\)"),
        ({"kind": "ddpm"}, r"\(scheduler DDIMSchedule there, DDPMSchedule here;.*\)"),
        ({"sampler": {"steps": 5}}, r"\(step count 6 there, 5 here\)"),
        ({"sampler": {"beta_end": 0.01}}, r"\(the scheduler's beta_end 0\.02 there, 0\.01 here\)"),
        ({"sampler": {"timestep_spacing": "trailing"}}, r"\(the scheduler's timesteps \[.*\] there, \[.*\] here\)"),
        ({"denoiser": {"guidance": 3.0}}, r"\(guidance None there, 3\.0 here\)"),
        ({"seed": 2}, r"\(seed 1 there, 2 here\)"),
        ({"shape": (2, 4, 8)}, r"\(shape \[2, 4, 4\] there, \[2, 4, 8\] here\)"),
        ({"seed": 2, "denoiser": {"weight": 0.7}}, r"\(model .* here; seed 1 there, 2 here\)"),
    ],
)
def test_a_folder_of_something_else_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    ensured(tmp_path)
    before = chunks(tmp_path)
    arguments = dict(changes)
    denoiser = fake(**arguments.pop("denoiser", {}))
    if "sampler" in arguments:
        arguments["sampler"] = sampler(**arguments["sampler"])
    with pytest.raises(CheckpointError, match=f"{message}: delete the folder {tmp_path}, or write cache_dir="):
        ensured(tmp_path, denoiser, **arguments)
    assert denoiser.batches == []
    assert chunks(tmp_path) == before


def test_without_its_description_files_of_another_model_are_not_taken(tmp_path: Path) -> None:
    ensured(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    denoiser = fake(weight=0.7)
    ensured(tmp_path, denoiser)
    assert sum(denoiser.batches) == 10 * 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"options": 3}', "3"])
def test_a_damaged_description_is_refused(content: str, tmp_path: Path) -> None:
    ensured(tmp_path)
    (tmp_path / DESCRIPTION).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{DESCRIPTION} is truncated or changed .*: delete the folder"):
        ensured(tmp_path)


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def _no_header(content: bytes) -> bytes:
    return b"\xff" * 16 + content[16:]


def _empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [_truncated, _flipped, _no_header, _empty])
def test_a_damaged_file_is_generated_again_with_a_warning(damage: Any, tmp_path: Path) -> None:
    ensured(tmp_path, kind="plms")
    path = chunks(tmp_path)[1]
    good = path.read_bytes()
    path.write_bytes(damage(good))
    denoiser = fake()
    with pytest.warns(UserWarning, match=rf"{path.name} is truncated or changed .*generated again"):
        cache = ensured(tmp_path, denoiser, "plms")
    assert denoiser.batches == [4] * 7
    assert path.read_bytes() == good
    assert_equal(cache.trajectories(IDS), direct("plms"))


def test_a_file_that_is_gone_while_it_is_used_is_named(tmp_path: Path) -> None:
    cache = ensured(tmp_path)
    chunks(tmp_path)[0].unlink()
    with pytest.raises(CheckpointError, match=r"was removed or damaged during the run .*: start again"):
        cache.window([0], 0, 2)
    assert len(cache.window([4], 0, 2)) == 1


def _on_shared_folder(folder: Path) -> Any:
    def job(rank: int, ranks: int) -> tuple[list[int], bool]:
        denoiser = fake()
        cache = ensured(folder, denoiser, "ddpm")
        found = cache.trajectories(IDS)
        return denoiser.batches, torch.equal(found.states, direct("ddpm").states)

    return job


def test_two_ranks_share_the_work_and_find_the_same_files(tmp_path: Path) -> None:
    ensured(tmp_path / "one", kind="ddpm")
    found = on_ranks(2, _on_shared_folder(tmp_path / "two"))
    assert [batches for batches, _ in found] == [[4] * 6 + [2] * 6, [4] * 6]
    assert all(equal for _, equal in found)
    one, two = ({p.name: p.read_bytes() for p in chunks(tmp_path / name)} for name in ("one", "two"))
    assert one == two


def test_ranks_without_a_shared_folder_generate_all_of_it(tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> tuple[int, bool]:
        denoiser = fake()
        cache = ensured(tmp_path / str(rank), denoiser)
        return sum(denoiser.batches), torch.equal(cache.trajectories(IDS).states, direct("ddim").states)

    assert on_ranks(2, job) == [(60, True), (60, True)]


def test_a_rank_that_fails_stops_the_others(tmp_path: Path) -> None:
    def job(rank: int, ranks: int) -> str:
        with pytest.raises(QuantizationError) as caught:
            ensured(tmp_path, fake(broken=sampler().timesteps[2] if rank else None))
        return str(caught.value)

    first, second = on_ranks(2, job)
    assert first.startswith("1 other ranks could not generate")
    assert "NaN at step 2" in second


def test_quantizers_do_not_change_the_hash_and_weights_and_buffers_do() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    float_hash = weights_hash(network)
    swap(network[0], weight_quantizer=FixedQuantizer(4, axis=0))
    assert weights_hash(network) == float_hash
    with torch.no_grad():
        network[1].get_buffer("running_mean")[1] = 1e-7
    changed = weights_hash(network)
    assert changed != float_hash
    network[0].weight.data = network[0].weight.data.to(torch.bfloat16)
    assert weights_hash(network) not in (changed, float_hash)


def test_the_estimate_is_the_size_of_the_files(tmp_path: Path) -> None:
    for kind in ("ddim", "plms"):
        ensured(tmp_path / kind, kind=kind)
        steps = sampler(kind)
        expected = trajectory_bytes(10, len(steps.timesteps), SHAPE, steps.history)
        headers = 0
        for path in chunks(tmp_path / kind):
            headers += 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert sum(path.stat().st_size for path in chunks(tmp_path / kind)) - headers == expected


def test_a_disk_that_is_too_small_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    denoiser = fake()
    with pytest.raises(ConfigurationError, match=r"10 trajectories need 0\.00 GB, .*write cache_dir="):
        ensured(tmp_path, denoiser)
    assert denoiser.batches == []


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="chunk=0: expected at least one image"):
        TrajectoryCache(tmp_path, chunk=0)
    with pytest.raises(ConfigurationError, match="call ensure"):
        TrajectoryCache(tmp_path).trajectories([0])
    with pytest.raises(ConfigurationError, match="ids has 3 numbers, 2 of them different"):
        ensured(tmp_path, ids=[0, 1, 1])
    with pytest.raises(ConfigurationError, match="class_labels has 3 rows for 10 images"):
        ensured(tmp_path, conditioning=labels(range(3)))
    cache = ensured(tmp_path)
    with pytest.raises(ConfigurationError, match="Image 10 is not among the 10 of the cache"):
        cache.trajectories([0, 10])
    with pytest.raises(ConfigurationError, match=r"steps 5 \.\. 6 is not within the trajectory's, 0 \.\. 5"):
        cache.window([0], 5, 7)


def test_the_description_says_what_the_folder_holds(tmp_path: Path) -> None:
    ensured(tmp_path, kind="plms")
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    assert (described["scheduler"], described["step count"], described["seed"]) == ("PNDMScheduler", 6, 1)
    assert described["model"] == weights_hash(fake().network)
    with safetensors.safe_open(chunks(tmp_path)[2], framework="pt") as file:
        assert file.get_slice("states").get_shape() == [2, 8, *SHAPE]
        assert file.get_slice("outputs").get_shape() == [2, 7, *SHAPE]
