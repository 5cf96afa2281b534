"""The class through which diffusers loads the quantized denoiser of a pipeline.

``model_index.json`` names this module: ``DiffusionPipeline.from_pretrained`` opens the folder if the module was
imported before, and asks for it otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.export.artifact import load_quantized


class QuantizedDenoiser(ModelMixin):  # type: ignore[misc, no-untyped-call]
    """Loader of the denoiser that :func:`lightning_quant.save_quantized_pipeline` wrote, in its original class."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> nn.Module:  # type: ignore[override]
        """Load the denoiser, on the CPU.

        Args:
            folder: Folder of the denoiser.
            arguments: Arguments that diffusers passes on; only ``torch_dtype`` has an effect.

        Raises:
            CheckpointError: Files that are missing, truncated or changed.
            ConfigurationError: A ``device_map``.
        """
        if arguments.get("device_map") is not None:
            raise ConfigurationError(
                f"device_map={arguments['device_map']!r}: a quantized denoiser is loaded in one piece. Leave device_map"
                " out, and write pipeline.to(device)."
            )
        network = load_quantized(folder)
        dtype = arguments.get("torch_dtype")
        return network if dtype is None else network.to(dtype)
