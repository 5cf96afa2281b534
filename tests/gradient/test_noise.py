import copy
import pickle

import torch

from lightning_quant.gradient.noise import OFFSETS, POOL_BATCHES, NoiseSource

CPU = torch.device("cpu")


def draws(source: NoiseSource, batch: int, count: int = 5) -> list[float]:
    source.restart(batch)
    values: list[float] = source.draw(count, CPU).tolist()
    return values


def test_a_batch_repeats_and_batches_ranks_and_seeds_differ() -> None:
    source = NoiseSource(1)
    first = draws(source, 7)
    assert draws(source, 8) != first
    assert draws(NoiseSource(1, rank=1), 7) != first
    assert draws(NoiseSource(2), 7) != first
    assert draws(source, 7) == first


def test_copies_draw_the_same() -> None:
    source = NoiseSource(3, rank=2)
    first = draws(source, 4)
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert draws(twin, 4) == first


def test_tensors_of_a_batch_do_not_share_their_noise_position_by_position() -> None:
    source = NoiseSource(0)
    a, b = (source.draw(1000, CPU) for _ in range(2))
    assert float((a == b).float().mean()) < 0.01


def test_a_larger_tensor_gets_a_larger_pool_without_repeats() -> None:
    source = NoiseSource(0)
    source.draw(10, CPU)
    noise = source.draw(3 * OFFSETS, CPU)
    assert noise.numel() == 3 * OFFSETS
    shifted = (noise[OFFSETS:] == noise[:-OFFSETS]).float().mean()
    assert float(shifted) < 1e-3


def test_what_the_pool_grew_by_does_not_matter() -> None:
    a, b = NoiseSource(0), NoiseSource(0)
    a.draw(10, CPU)
    b.draw(5 * OFFSETS, CPU)
    for batch in (1, POOL_BATCHES + 1, 2):
        a.restart(batch)
        b.restart(batch)
        assert torch.equal(a.draw(2 * OFFSETS, CPU), b.draw(2 * OFFSETS, CPU))


def test_the_pool_is_renewed() -> None:
    source = NoiseSource(0)
    pools = []
    for batch in (0, POOL_BATCHES - 1, POOL_BATCHES):
        source.restart(batch)
        source.draw(OFFSETS, CPU)
        pools.append(source._pool[:OFFSETS])
    assert torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[1], pools[2])


def test_the_users_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    source = NoiseSource(0)
    source.restart(1)
    source.draw(100, CPU)
    assert torch.equal(torch.rand(3), expected)
