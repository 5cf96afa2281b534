"""Loading of Lightning checkpoints with a quantized module: first its structure, then its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_quant.nn.structure import rebuild
from lightning_quant.utilities.attributes import replaced_attribute
from lightning_quant.utilities.paths import local_path

LightningModuleT = TypeVar("LightningModuleT", bound=pl.LightningModule)


def load_from_checkpoint(cls: type[LightningModuleT], checkpoint_path: str | Path, **kwargs: Any) -> LightningModuleT:
    """Load a quantized checkpoint of a LightningModule class that has no code for quantization.

    Args:
        cls: LightningModule class that was trained.
        checkpoint_path: Path of the ``.ckpt`` file.
        kwargs: Arguments of ``LightningModule.load_from_checkpoint``.

    Returns:
        The quantized module, in training mode as Lightning leaves it: call ``eval()`` to evaluate.

    Raises:
        CheckpointError: Unknown version of the format, or quantized layers that the module does not have.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_quant import GradientQuantization
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = pl.Trainer(
        ...         accelerator="cpu", max_steps=1, limit_val_batches=0, enable_checkpointing=False, logger=False,
        ...         callbacks=[GradientQuantization(first_and_last="same")], default_root_dir=folder,
        ...         enable_progress_bar=False, enable_model_summary=False,
        ...     )
        ...     trainer.fit(BoringModel())
        ...     trainer.save_checkpoint(folder + "/last.ckpt")
        ...     loaded = load_from_checkpoint(BoringModel, folder + "/last.ckpt")
        >>> type(loaded.layer).__name__
        'QuantizedLinear'
    """
    with _rebuilding(cls):
        return cls.load_from_checkpoint(local_path(checkpoint_path), **kwargs)


@contextmanager
def _rebuilding(cls: type[pl.LightningModule]) -> Iterator[None]:
    """Let modules of a class take on the structure of the state dict that they load, within this context."""
    load = cls.load_state_dict

    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        rebuild(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    with replaced_attribute(cls, "load_state_dict", load_state_dict):
        yield
