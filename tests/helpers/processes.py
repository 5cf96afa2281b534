"""Several gloo processes on the CPU, forked."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = Callable[[int, int], Any]


def _run(rank: int, ranks: int, port: int, job: Job, results: Any) -> None:
    torch.set_num_threads(1)
    # As torchrun has it, so that a Trainer takes part.
    elastic = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in {**elastic, **where}.items()})
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
        results.put((rank, job(rank, ranks), None))
        dist.destroy_process_group()
    except Exception:
        results.put((rank, None, traceback.format_exc()))


def _result(results: Any, processes: list[Any]) -> Any:
    """The next of a queue; an error where a process died by a signal and nothing will come."""
    while results.empty():
        died = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
        assert not died, f"a rank ended with {died[0]}"
        time.sleep(0.005)
    return results.get()


def on_ranks(ranks: int, job: Job) -> list[Any]:
    """What ``job(rank, ranks)`` returns on each of several forked processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_run, args=(rank, ranks, port, job, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = sorted((_result(results, processes) for _ in processes), key=lambda item: item[0])
    for process in processes:
        # Its result is here. Gloo of torch 2.6 may wait for ever when its group is given up.
        process.join(20)
        process.kill()
    errors = [error for _, _, error in found if error]
    assert not errors, errors[0]
    return [result for _, result, _ in found]
