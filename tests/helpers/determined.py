"""A run of each method with tensors large enough for PyTorch to split among threads.

As a program, ``python determined.py FOLDER THREADS`` runs all three. It writes each one's artefact to FOLDER/NAME and
its outputs to FOLDER/NAME.safetensors, and prints the hashes of the float weights and of the artefact's tensors.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.networks import SmallNet, quantization, trainer
from helpers.small_diffusion import SMALL, Project, quiet_trainer
from helpers.vits import Dicts, VitModule, images, quiet, spread
from lightning_quant import AccuQuant, IGQViT, save_quantized
from lightning_quant.nn.structure import weights_hash

SHAPE = (1, 48, 48)


def trained(folder: Path) -> tuple[Any, Tensor]:
    """INT4 training, two epochs with batches in random order and stochastic rounding."""
    module = SmallNet(width=64)
    loader = module.train_dataloader()
    trainer(quantization(quantizer_lr=1e-3), default_root_dir=folder, max_epochs=2).fit(
        module, DataLoader(loader.dataset, batch_size=16, shuffle=True)
    )
    return module, torch.stack([loader.dataset[i][0] for i in range(8)])


def grouped(folder: Path) -> tuple[Any, Tensor]:
    """IGQ-ViT, groups allocated."""
    module = VitModule()
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "in_chans": 1, "depth": 2, "embed_dim": 96}
    module.backbone = spread(timm.create_model("vit_tiny_patch16_224", num_classes=10, num_heads=3, **sizes))
    x = images(16, 32)
    ours = IGQViT(groups=4, calibration_images=16)
    quiet(folder, ours).test(module, DataLoader(Dicts(x, torch.arange(16) % 10), batch_size=16), verbose=False)
    return module, x[:8]


def windowed(folder: Path) -> tuple[Any, Tensor]:
    """AccuQuant after block reconstruction."""
    module, x = Project(), torch.randn(8, *SHAPE)
    ours = AccuQuant(**{**SMALL, "reconstruction": 10, "updates": 20}, denoiser="unet", sample_shape=SHAPE)
    loader: Any = DataLoader(x, batch_size=4)  # type: ignore[arg-type]
    quiet_trainer(folder, callbacks=[ours]).test(module, loader, verbose=False)
    return module, x


RUNS: dict[str, Callable[[Path], tuple[Any, Tensor]]] = {
    "int4_training": trained,
    "igq_vit": grouped,
    "accuquant": windowed,
}


@torch.no_grad()
def main(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    hashes = {}
    for name, run in RUNS.items():
        pl.seed_everything(7, verbose=False)
        with torch.enable_grad():
            module, x = run(folder / f"run {name}")
        save_quantized(module.eval(), folder / name)
        output = module.predict_step(x) if name == "accuquant" else module(x)
        save_file({"output": output}, folder / f"{name}.safetensors")
        codes = (folder / name / "model.safetensors").read_bytes()
        hashes[name] = [weights_hash(module), hashlib.sha256(codes).hexdigest()]
    print(json.dumps(hashes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
