"""Images that a module's own step passes to its network, for batches of all kinds."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from helpers.vits import images, vit
from lightning_quant.calibration.step_images import StepImages
from lightning_quant.errors import ConfigurationError

X = images(4)
Y = torch.arange(4)


class Picks(pl.LightningModule):
    """Somebody's module; ``pick`` is what its step does before the network."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.net, self.pick, self.steps = vit(), pick, 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        self.log("before", torch.rand(1))
        self.seen.append(self(self.pick(batch)))


def ask(module: pl.LightningModule, verb: Any = TrainerFn.TESTING) -> StepImages:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.state.fn = verb
    return StepImages(trainer, module, [name for name, _ in module.named_modules() if name.endswith(".attn")])


@pytest.mark.parametrize(
    ("batch", "pick", "expected"),
    [
        ((X, Y), lambda b: b[0], X),
        ((Y, X, Y), lambda b: b[1], X),
        ((Y.float(), X), lambda b: b[1], X),
        (((X * 9).byte(), Y), lambda b: b[0].float() / 255, (X * 9).byte().float() / 255),
        ((X.byte(), Y), lambda b: b[0], X.byte()),
        ({"pixels": X, "y": Y}, lambda b: b["pixels"], X),
        ({"inputs": {"image": X}}, lambda b: b["inputs"]["image"], X),
        (((X, X + 1), Y), lambda b: b[0][1], X + 1),
        ((X, X + 1), lambda b: b[1], X + 1),
        (([X, X[..., :4]], Y), lambda b: b[0][0], X),
        ((torch.stack([X, X + 1], 1), Y), lambda b: b[0].flatten(0, 1), torch.stack([X, X + 1], 1).flatten(0, 1)),
    ],
)
def test_what_the_step_passes_to_the_network_is_the_image(batch: Any, pick: Any, expected: Tensor) -> None:
    module = Picks(pick).eval()
    asked = ask(module)
    assert torch.equal(asked(batch), expected)
    assert asked.network == ""


def test_nothing_is_left_of_the_step() -> None:
    module = Picks(lambda b: b[0]).eval()
    asked = ask(module)
    before, state = dict(vars(module)), torch.get_rng_state()
    asked((X, Y))
    assert vars(module) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert module.steps == 0
    assert module.seen == []
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_a_part_that_the_step_calls_itself_is_the_network() -> None:
    class Direct(Picks):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            try:
                self.net(x=2 * batch[1])
            except Exception as error:  # which users write
                raise AssertionError from error

    asked = ask(Direct(list))
    assert torch.equal(asked((Y, X)), 2 * X)
    assert asked.network == "net"


@pytest.mark.parametrize(
    ("verb", "expected"), [(TrainerFn.TESTING, X), (TrainerFn.PREDICTING, X + 2), (TrainerFn.VALIDATING, X + 1)]
)
def test_the_step_of_the_running_verb_goes_first(verb: Any, expected: Tensor) -> None:
    class Steps(Picks):
        def validation_step(self, batch: Any, i: int, loader: int) -> None:
            self(batch[0] + 1)

        def predict_step(self, batch: Any) -> Any:
            return self(batch[0] + 2)

    assert torch.equal(ask(Steps(lambda b: b[0]), verb)((X, Y)), expected)


def test_a_step_that_the_batch_is_not_for_leaves_it_to_the_next_one() -> None:
    class Views(Picks):
        def training_step(self, *args: Any) -> None:
            (views, _), _ = args
            self(views[0])

    assert torch.equal(ask(Views(lambda b: b[0]))(((X, X + 1), Y)), X)


def test_where_no_step_tells_the_batch_itself_is_looked_at() -> None:
    class Hidden(Picks):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.net.forward_features(batch[0])  # type: ignore[operator]

    assert torch.equal(ask(Picks(lambda b: b[7]))((X, Y)), X)
    # The patch embedding gets an image too, but is not the network.
    assert torch.equal(ask(Hidden(list))((X, Y)), X)
    with pytest.raises(
        ConfigurationError, match=r"Found a tuple of .* yield images either: test_step raised IndexError"
    ):
        ask(Picks(lambda b: b[7]))((Y, X))


def test_the_first_batch_decides() -> None:
    asked = ask(Picks(lambda b: b[1]))
    asked((Y, X))
    with pytest.raises(ConfigurationError, match=r"for one of the batches it raised IndexError: .*images=FUNCTION"):
        asked((X,))
    fallen = ask(Picks(lambda b: b[1]))
    fallen((X,))
    assert torch.equal(fallen((X, X + 1)), X)


def test_modules_beside_the_network_run() -> None:
    class Normalizing(Picks):
        def __init__(self, pick: Any) -> None:
            super().__init__(pick)
            self.norm = nn.InstanceNorm2d(1)

    module = Normalizing(None)
    module.pick = lambda b: module.norm(b[0])
    assert torch.equal(ask(module)((X, Y)), module.norm(X))
