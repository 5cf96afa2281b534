"""Something that follows the setup of a module once, and leaves no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_quant.nn.late import after_setup, builds_late, cancel_after_setup


class Late(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)


class Configured(pl.LightningModule):
    def configure_model(self) -> None:
        pass


@pytest.mark.parametrize(("make", "late"), [(pl.LightningModule, False), (Late, True), (Configured, True)])
def test_modules_that_override_a_hook_build_late(make: Any, late: bool) -> None:
    assert builds_late(make()) == late


def test_it_follows_once_and_only_the_last_one() -> None:
    module, calls = Late(), list[str]()
    after_setup(module, lambda: calls.append("first"))
    after_setup(module, lambda: calls.append(f"after {module.stages}"))
    for stage in ("fit", "test"):
        module.setup(stage=stage)
    assert calls == ["after ['fit']"]
    assert module.stages == ["fit", "test"]
    assert "setup" not in vars(module)


def test_it_is_gone_when_setup_fails_or_it_is_cancelled() -> None:
    module = Late()
    after_setup(module, pytest.fail)
    cancel_after_setup(module)
    module.setup("fit")
    del module.stages
    after_setup(module, pytest.fail)
    with pytest.raises(AttributeError, match="stages"):
        module.setup("fit")
    assert "setup" not in vars(module)


def test_copies_do_not_take_it_along() -> None:
    module = Late()
    after_setup(module, pytest.fail)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied.setup("fit")
        assert copied.stages == ["fit"]
    assert module.stages == []
