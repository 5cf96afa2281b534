"""Base class of the section that each method adds to the report of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant.analysis import Analysis, Cause, LayerAnalysis, find_causes
from lightning_quant.report import remedies
from lightning_quant.report.remedies import Finding, Remedy, Settings


class Section:
    """Section of one method in the report of a run. The base class serves networks of unknown method."""

    @property
    def name(self) -> str:
        """Name of the method on the page."""
        return "Quantized network"

    @property
    def detail(self) -> str:
        """First sentence of the page with a trailing space, or an empty string."""
        return ""

    @property
    def execution(self) -> str:
        """Sentence on how products are executed."""
        return "Products are simulated in floating point."

    @property
    def names_are_of_the_denoiser(self) -> bool:
        """Whether layers are named as in the denoiser instead of the module."""
        return False

    @property
    def plan(self) -> str:
        """Plan as text; empty if there is none."""
        return ""

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        """Draw the pictures of the method.

        Args:
            folder: Folder for the pictures.
            network: Module with the quantized network.
            forward: Function that runs the quantized network on recorded images.

        Returns:
            Files, keyed by their titles on the page.
        """
        return {}

    def figures(self) -> Mapping[str, Any]:
        """Return the figures that only the JSON twin of the page contains."""
        return {}

    def advice(self) -> Iterable[Finding]:
        """Return findings about the run as a whole."""
        return ()

    @property
    def settings(self) -> Settings:
        """Arguments of the method, keyed by name; empty if they are unknown."""
        return {}

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        """Return the remedy for a cause of error in a layer."""
        return remedies.of_any(cause, layer, self.settings)

    def findings(self, analysis: Analysis) -> dict[str, list[Finding]]:
        """Find causes and remedies of each layer, keyed by its name."""
        return {
            layer.name: [self._finding(cause, layer, analysis) for cause in find_causes(layer)]
            for layer in analysis.layers
        }

    def _finding(self, cause: Cause, layer: LayerAnalysis, analysis: Analysis) -> Finding:
        words, line = self.remedy(cause, layer)
        measured = remedies.effect(layer, analysis) if line.startswith("exclude=") else ""
        return Finding(str(cause), f"{words[0].upper()}{words[1:]}{measured}.", line)
