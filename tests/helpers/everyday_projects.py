"""Somebody's three projects, one a method, with a Trainer's callbacks around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from helpers.networks import Images, SmallNet, quantization
from helpers.networks import trainer as training
from helpers.small_diffusion import SHAPE, SMALL, Project, batches, quiet_trainer
from helpers.vits import VitData, VitModule, images, quiet
from lightning_quant import AccuQuant, IGQViT


@dataclass(frozen=True)
class Everyday:
    """A project and the callback of its method.

    Attributes:
        module: makes it, from a seed.
        data: makes what ``fit`` and ``test`` take after the module.
        callback: makes ours.
        trainer: of a folder, callbacks and options.
        outputs: of a module in evaluation, on inputs that are always the same.
    """

    module: Callable[[], Any]
    data: Callable[[], tuple[Any, ...]]
    callback: Callable[[], pl.Callback]
    trainer: Callable[..., Any]
    outputs: Callable[[Any], Tensor]

    def fitted_and_tested(self, folder: Path, *others: pl.Callback, before: bool = False, **options: Any) -> Any:
        """The module after fit and test, our callback first or last."""
        torch.manual_seed(0)
        module, ours = self.module(), self.callback()
        order = [*others, ours] if before else [ours, *others]
        trainer = self.trainer(folder, *order, **options)
        trainer.fit(module, *self.data())
        trainer.test(module, *self.data(), verbose=False)
        return module

    def saved(self, module: Any, folder: Path) -> Path:
        """A checkpoint of a module that has been run."""
        end = self.trainer(folder, self.callback())
        end.strategy.connect(module)
        end.save_checkpoint(folder / "end.ckpt")
        return folder / "end.ckpt"


def _net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@torch.no_grad()
def _of_images(module: Any) -> Tensor:
    device = next(module.parameters()).device
    found: Tensor = module.eval()(torch.stack([Images(4)[i][0] for i in range(4)]).to(device))
    return found


@torch.no_grad()
def _of_vit(module: Any) -> Tensor:
    found: Tensor = module.eval()(images(3, seed=9))
    return found


@torch.no_grad()
def _of_noise(module: Any) -> Tensor:
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(4))
    found: Tensor = module.eval().unet(noise, timestep=torch.full((3,), 300))
    return found


PROJECTS = {
    "int4_training": Everyday(
        _net,
        tuple,
        lambda: quantization(quantizer_lr=1e-3),
        lambda folder, *callbacks, **options: training(*callbacks, default_root_dir=folder, **options),
        _of_images,
    ),
    "igq_vit": Everyday(
        VitModule,
        lambda: (VitData(),),
        lambda: IGQViT(groups=4, calibration_images=8, allocate=False),
        quiet,
        _of_vit,
    ),
    "accuquant": Everyday(
        Project,
        lambda: (batches(),),
        lambda: AccuQuant(**SMALL, denoiser="unet", sample_shape=SHAPE),
        lambda folder, *callbacks, **options: quiet_trainer(
            folder, callbacks=list(callbacks), **{"max_epochs": 1, **options}
        ),
        _of_noise,
    ),
}
