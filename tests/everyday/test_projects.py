"""Modules of other kinds: two networks trained by hand, and a denoiser called by keywords."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.diffusion import tiny_condition_unet
from helpers.small_diffusion import SMALL, quiet_trainer
from lightning_quant import AccuQuant, GradientQuantization, load_from_checkpoint
from lightning_quant.calibration.module import is_calibrated

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class GAN(pl.LightningModule):
    """Generator and discriminator, each with its own optimizer, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(
            nn.Linear(8, 8 * 16),
            nn.Unflatten(1, (8, 4, 4)),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 3, 3, padding=1),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(32, 1),
        )

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.generator(noise)
        return images

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()  # type: ignore[misc, attr-defined]
        noise = torch.randn(len(real), 8, generator=torch.Generator().manual_seed(batch_idx))
        self.toggle_optimizer(of_generator)
        loss = F.softplus(-self.discriminator(self(noise))).mean()
        self.manual_backward(loss)
        of_generator.step()
        of_generator.zero_grad()
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_discriminator)
        made = self(noise).detach()
        loss = (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(made))).mean()
        self.manual_backward(loss)
        of_discriminator.step()
        of_discriminator.zero_grad()
        self.untoggle_optimizer(of_discriminator)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), 2e-4, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), 2e-4, betas=(0.5, 0.999)),
        ], []


def test_int4_training_of_two_networks_by_hand(tmp_path: Path) -> None:
    module, callback = GAN(), GradientQuantization(first_and_last="same", quantizer_lr=1e-3)
    real = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, DataLoader(real, batch_size=4))  # type: ignore[arg-type]
    assert is_calibrated(module)
    # Each layer is stepped with the optimizer of its network: eight batches, one step of each.
    assert [ours["steps"] for ours in callback.state_dict()["optimizers"]] == [8, 8]
    assert [{name.split(".")[0] for name in ours["names"]} for ours in callback.state_dict()["optimizers"]] == [
        {"generator"},
        {"discriminator"},
    ]
    trainer.save_checkpoint(tmp_path / "gan.ckpt")
    noise = torch.randn(3, 8)
    loaded = load_from_checkpoint(GAN, tmp_path / "gan.ckpt")
    assert torch.equal(loaded.eval()(noise), module.eval()(noise))


class Diffusion(pl.LightningModule):
    """A conditional denoiser of diffusers, called by keywords in all its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = tiny_condition_unet()
        self.noise_scheduler: Any = DDPMScheduler()
        self.register_buffer("words", torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2)))

    def predicted(self, latents: Tensor, step: int, labels: Tensor) -> Tensor:
        found: Tensor = self.unet(
            sample=latents,
            timestep=torch.full((len(latents),), step),
            encoder_hidden_states=self.words[labels],  # type: ignore[index]
            return_dict=True,
        ).sample
        return found

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(batch_idx))
        steps = torch.full((len(noise),), 400)
        noisy = self.noise_scheduler.add_noise(batch["latents"], noise, steps)
        return F.mse_loss(self.predicted(noisy, 400, batch["label"]), noise)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.predicted(batch["latents"], 400, batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class WithWords(AccuQuant):
    """What the docstring of ``conditioning`` asks for: a row for each image."""

    def conditioning(self, pl_module: pl.LightningModule, ids: Sequence[int]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": pl_module.words[torch.tensor(ids) % 4]}  # type: ignore[index]


def latents() -> DataLoader[Any]:
    values = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return DataLoader([{"latents": x, "label": i % 4} for i, x in enumerate(values)], batch_size=4)  # type: ignore[arg-type]


def outputs(module: Diffusion) -> Tensor:
    with torch.no_grad():
        return module.eval().predicted(torch.ones(2, 4, 8, 8), 300, torch.tensor([0, 3]))


@pytest.mark.parametrize("callback", [GradientQuantization(), WithWords(**SMALL)], ids=["int4_training", "accuquant"])
def test_a_denoiser_called_by_keywords(callback: pl.Callback, tmp_path: Path) -> None:
    module = Diffusion()
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(module, latents())
    trainer.test(module, latents(), verbose=False)
    assert is_calibrated(module)
    trainer.save_checkpoint(tmp_path / "diffusion.ckpt")
    loaded = load_from_checkpoint(Diffusion, tmp_path / "diffusion.ckpt")
    assert torch.equal(outputs(loaded), outputs(module))
