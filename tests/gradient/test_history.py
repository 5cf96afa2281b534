"""What layers logged is kept: bounded, whole over a stop, and in checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

from helpers.networks import SmallNet, quantization, trainer
from lightning_quant.gradient.history import History


def test_a_long_training_keeps_few_steps_evenly_spread() -> None:
    history = History(points=8)
    for step in range(1000):
        history.add(step, {"gamma": step / 2})
        assert len(history.rows) <= 8
    steps = [step for step, _ in history.rows]
    assert len(steps) >= 4
    assert steps == list(range(0, steps[-1] + 1, steps[1]))
    assert all(metrics == {"gamma": step / 2} for step, metrics in history.rows)


def test_it_goes_on_from_a_state_as_if_never_stopped() -> None:
    whole, stopped = History(points=8), History(points=8)
    for step in range(50):
        metrics = {"a": math.sin(step)} if step % 3 else {"a": math.sin(step), "b": math.cos(step)}
        whole.add(step, metrics)
        stopped.add(step, metrics)
        stopped = History(stopped.state_dict(), points=8)
        assert stopped.rows == whole.rows


def test_a_resumed_training_remembers_its_beginning(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> History:
        callback = quantization()
        fit = trainer(callback, default_root_dir=tmp_path, max_epochs=epochs, log_every_n_steps=2)
        fit.fit(SmallNet(), ckpt_path=ckpt_path)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return callback.history

    first = run(1).rows
    assert first
    resumed = run(2, tmp_path / "1.ckpt").rows
    assert resumed[: len(first)] == first
    assert len(resumed) == 2 * len(first)
    # Without a checkpoint it begins.
    assert len(run(1).rows) == len(first)
