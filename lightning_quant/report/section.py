"""The base class of what each method adds to the report of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant.analysis import Analysis, Cause, LayerAnalysis, find_causes
from lightning_quant.report import remedies
from lightning_quant.report.remedies import Finding, Remedy, Settings


class Section:
    """What one method adds to the report of a run; by itself that of a network of which nothing more is known."""

    @property
    def name(self) -> str:
        """Name of the method on the page."""
        return "A quantized network"

    @property
    def detail(self) -> str:
        """First sentence of the page and a space; may be empty."""
        return ""

    @property
    def execution(self) -> str:
        """One sentence on how products run."""
        return "Products are simulated in floating point."

    @property
    def names_are_of_the_denoiser(self) -> bool:
        """Whether layers have their names in the denoiser, not those in the module."""
        return False

    @property
    def plan(self) -> str:
        """Plan as text; empty where there is none beyond the layers."""
        return ""

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        """Draw the pictures of the method.

        Args:
            folder: Folder for the pictures.
            network: Module with the quantized network.
            forward: Function that calls what is quantized with recorded images.

        Returns:
            Files by the titles that the page gives them.
        """
        return {}

    def figures(self) -> Mapping[str, Any]:
        """Return the figures that only the JSON twin of the page holds."""
        return {}

    def advice(self) -> Iterable[Finding]:
        """Yield what the run as a whole suggests."""
        return ()

    @property
    def settings(self) -> Settings:
        """Arguments of the method by name, as far as they are known."""
        return {}

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        """Return what to write against a cause of error in a layer."""
        return remedies.of_any(cause, layer, self.settings)

    def findings(self, analysis: Analysis) -> dict[str, list[Finding]]:
        """Find causes and remedies of each layer, by its name."""
        return {
            layer.name: [self._finding(cause, layer, analysis) for cause in find_causes(layer)]
            for layer in analysis.layers
        }

    def _finding(self, cause: Cause, layer: LayerAnalysis, analysis: Analysis) -> Finding:
        words, line = self.remedy(cause, layer)
        measured = remedies.effect(layer, analysis) if line.startswith("exclude=") else ""
        return Finding(str(cause), f"{words[0].upper()}{words[1:]}{measured}.", line)
