"""The class by which diffusers loads the quantized denoiser of a pipeline.

``model_index.json`` names it, so that ``DiffusionPipeline.from_pretrained`` opens the folder where this module was
imported before, and says its name where it was not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lightning_quant.errors import ConfigurationError
from lightning_quant.export.artifact import load_quantized


class QuantizedDenoiser(ModelMixin):  # type: ignore[misc, no-untyped-call]
    """A denoiser on disk, of :func:`lightning_quant.save_quantized_pipeline`; in memory it has its own class."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> nn.Module:  # type: ignore[override]
        """Load the denoiser, on the CPU.

        Args:
            folder: Folder of the denoiser.
            arguments: What diffusers passes on, of which ``torch_dtype`` counts.

        Raises:
            CheckpointError: For files that are missing, cut off or changed.
            ConfigurationError: For a ``device_map``.
        """
        if arguments.get("device_map") is not None:
            raise ConfigurationError(
                f"device_map={arguments['device_map']!r}: a quantized denoiser is loaded as a whole. Leave device_map"
                " out, and write pipeline.to(device)."
            )
        network = load_quantized(folder)
        dtype = arguments.get("torch_dtype")
        return network if dtype is None else network.to(dtype)
