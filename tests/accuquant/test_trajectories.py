"""Rolling out: equal to the loop that it stands for, in any batches, and windows that go on as the whole does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.rollouts import KINDS, SHAPE, fake, sampler
from lightning_quant.accuquant.trajectories import Trajectories, check_finite, generate, trajectory_bytes
from lightning_quant.accuquant.windows import roll
from lightning_quant.data.noise import initial_noise, step_noise
from lightning_quant.errors import ConfigurationError, QuantizationError

IDS = [3, 8, 5, 0, 11]


def rolled(kind: str, ids: list[int] = IDS, keep: bool = True, batch: int | None = None) -> Trajectories:
    labels = {"class_labels": torch.tensor(ids) % 4}
    x = initial_noise(SHAPE, ids, seed=1)
    return generate(fake(), sampler(kind), x, labels, ids, 1, keep=keep, batch=batch)


def by_hand(kind: str) -> list[Tensor]:
    steps, network = sampler(kind), fake().network.eval()
    states, history = [initial_noise(SHAPE, IDS, seed=1)], steps.start()
    for k, t in enumerate(steps.timesteps):
        output = network(states[-1], t, torch.tensor(IDS) % 4).detach()
        x, history = steps.step(k, states[-1], output, history, step_noise(SHAPE, IDS, k, 1))
        states.append(x)
    return states


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loop_over_the_steps(kind: str) -> None:
    found, steps = rolled(kind), sampler(kind)
    assert torch.equal(found.states, torch.stack(by_hand(kind)))
    assert found.steps == range(len(steps.timesteps))
    assert (found.outputs is not None) == (steps.history > 0)
    assert not found.states.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_what_is_kept_change_nothing(kind: str) -> None:
    whole = rolled(kind)
    for batch in (1, 2, 9):
        found = rolled(kind, batch=batch)
        assert torch.equal(found.states, whole.states)
        if whole.outputs is not None and found.outputs is not None:
            assert torch.equal(found.outputs, whole.outputs)
    assert torch.equal(rolled(kind, keep=False, batch=2).states, whole.states[-1:])
    assert torch.equal(rolled(kind, ids=[5, 3]).states, whole.states[:, [2, 0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 4), (4, 6)])
def test_a_window_rolled_on_its_own_ends_where_the_trajectory_was(kind: str, start: int, stop: int) -> None:
    whole, steps, denoiser = rolled(kind), sampler(kind), fake()
    window = whole.window(start, stop, steps).batch(slice(1, 4))
    denoiser.network.eval()
    found = roll(lambda x, t: denoiser(x, t, window.conditioning), steps, window.to_window())
    assert window.steps == range(start, stop)
    assert torch.equal(torch.stack(found.states), whole.states[start : stop + 1, 1:4])
    for carried, history in zip(found.histories, window.histories, strict=False):
        assert all(map(torch.equal, carried, history))
    # Each step of it too, from the float state.
    for step in range(stop - start):
        single = window.to_window().single(step)
        end = roll(lambda x, t: denoiser(x, t, window.conditioning), steps, single).states[-1]
        assert torch.equal(end, whole.states[start + step + 1, 1:4])


def test_rows_of_a_batch_belong_together() -> None:
    whole = rolled("plms")
    index = torch.tensor([4, 1])
    some = whole.batch(index)
    assert some.ids.tolist() == [11, 8]
    assert len(some) == 2
    assert torch.equal(some.conditioning["class_labels"], torch.tensor([3, 0]))
    assert some.outputs is not None
    assert torch.equal(some.states, rolled("plms", ids=[11, 8]).states)
    mask = torch.tensor([False, True, False, False, True])
    assert torch.equal(whole.batch(mask).states, some.batch(torch.tensor([1, 0])).states)


def test_noise_is_that_of_the_rollout_and_only_where_steps_take_it() -> None:
    assert rolled("ddim").noise(2) is None
    noise = rolled("ddpm").batch(slice(2, 4)).noise(2)
    assert noise is not None
    assert torch.equal(noise, step_noise(SHAPE, [5, 0], 2, seed=1))
    assert len(rolled("ddpm").window(1, 4, sampler("ddpm")).to_window().noises) == 3


def test_the_network_evaluates_and_is_left_as_it_was() -> None:
    denoiser = fake()
    denoiser.network.train()
    denoiser.network.dropout.eval()
    x = initial_noise(SHAPE, [0], 0)
    generate(denoiser, sampler(), x, {}, [0], 0)
    assert denoiser.network.training
    assert not denoiser.network.dropout.training
    denoiser.network.dropout.train()
    first, second = (generate(denoiser, sampler(), x, {}, [0], 0).states for _ in range(2))
    assert torch.equal(first, second)


def test_calls_and_progress_are_counted() -> None:
    denoiser, steps, seen = fake(), sampler("plms"), list[int]()
    generate(denoiser, steps, initial_noise(SHAPE, range(5), 0), {}, range(5), 0, progress=seen.append, batch=2)
    assert denoiser.batches == [2] * 7 + [2] * 7 + [1] * 7
    assert denoiser.timesteps == [*steps.timesteps] * 3
    assert sum(seen) == 5 * len(steps.timesteps)


@pytest.mark.parametrize("batch", [None, 2])
def test_nan_is_named_with_its_step_and_image(batch: int | None) -> None:
    steps = sampler()
    x = initial_noise(SHAPE, [4, 7], 0)
    message = rf"denoiser's output contains NaN at step 3 \(timestep {steps.timesteps[3]}\), for the images 7\. "
    with pytest.raises(QuantizationError, match=message):
        generate(fake(broken=steps.timesteps[3]), steps, x, {}, [4, 7], 0, batch=batch)


def test_infinities_are_named_and_many_images_are_counted() -> None:
    with pytest.raises(
        QuantizationError, match=r"infinite values at step 0 \(timestep 9\), for the images 0, 1, 2, 3 and 2"
    ):
        check_finite(torch.full((6, 1, 1, 1), torch.inf), 0, 9, range(6))


def test_what_does_not_fit_is_refused() -> None:
    x = initial_noise(SHAPE, [0, 1], 0)
    with pytest.raises(ConfigurationError, match="x has 2 rows for 3 images"):
        generate(fake(), sampler(), x, {}, range(3), 0)
    with pytest.raises(ConfigurationError, match="class_labels has 1 rows for 2 images"):
        generate(fake(), sampler(), x, {"class_labels": torch.zeros(1)}, range(2), 0)
    with pytest.raises(ConfigurationError, match="2 images in batches of 0"):
        generate(fake(), sampler(), x, {}, range(2), 0, batch=0)
    whole = generate(fake(), sampler(), x, {}, range(2), 0, keep=True)
    with pytest.raises(ConfigurationError, match=r"steps 4 \.\. 6 is not within the trajectory's, 0 \.\. 5"):
        whole.window(4, 7, sampler())
    with pytest.raises(ConfigurationError, match="PNDMSampler uses earlier outputs"):
        whole.window(2, 4, sampler("plms"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_what_is_kept(kind: str) -> None:
    found, steps = rolled(kind), sampler(kind)
    tensors = [found.states, *([] if found.outputs is None else [found.outputs])]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert trajectory_bytes(len(IDS), len(steps.timesteps), SHAPE, steps.history) == size
