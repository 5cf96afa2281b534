"""Report section of IGQ-ViT: the budget curve of an allocation, and channel ranges before and after grouping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_quant.analysis import Cause, LayerAnalysis
from lightning_quant.calibration.callback import CalibratingCallback
from lightning_quant.calibration.module import CalibratingModule, is_calibrated
from lightning_quant.calibration.record import Record, is_finished, plan_of, settings_of
from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.groups import channel_groups, channel_ranges
from lightning_quant.igq_vit.calibration import INPUT, Calibration
from lightning_quant.igq_vit.records import OMEGA, curve_of, groups_of, tables_of
from lightning_quant.quantizers.grouped import GroupQuantizer
from lightning_quant.report import remedies
from lightning_quant.report.group_charts import draw_budget_curve, draw_channel_ranges
from lightning_quant.report.remedies import Remedy, Settings
from lightning_quant.report.section import Section
from lightning_quant.utilities.paths import check_on_first_rank, check_writable, user_path

TITLES = {
    "budget.png": "Perturbation over bit operations, for uniform and for allocated groups",
    "channel_ranges.png": "Channel ranges of one layer, before grouping and after",
}


class CalibrationPictures(pl.Callback):
    """Callback that draws ``budget.png`` and ``channel_ranges.png`` after a run with IGQViT or IGQViTModule.

    Args:
        folder: Folder of the pictures.
        layer: Name of the layer whose channels are drawn; None takes the one whose groups differ most in width.

    Example:
        >>> from lightning_quant import IGQViT
        >>> callbacks = [IGQViT(4, 4), CalibrationPictures("pictures")]
        >>> trainer = pl.Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path, layer: str | None = None) -> None:
        self.folder, self.layer = user_path(folder), layer

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise an error if the folder cannot be written to."""
        if stage in ("fit", "test"):
            check_on_first_rank(trainer, partial(check_writable, self.folder))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the calibration of an IGQViTModule."""
        self._draw(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the calibration of an IGQViT callback."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        holders: list[object] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        calibrating = [holder for holder in holders if isinstance(holder, CalibratingModule | CalibratingCallback)]
        calibrations = [holder.calibration for holder in calibrating if isinstance(holder.calibration, Calibration)]
        if calibrations and calibrations[0].finished and trainer.is_global_zero:
            written = draw_calibration(calibrations[0], self.folder, self.layer)
            rank_zero_info(f"Pictures of the calibration: {', '.join(map(str, written))}")
        elif not calibrations and is_calibrated(pl_module):
            rank_zero_warn(
                "CalibrationPictures drew nothing, because the network was calibrated in an earlier run. Use"
                " QuantizationReport, which also draws calibrations from checkpoints."
            )


def draw_calibration(calibration: Calibration, folder: str | Path, layer: str | None = None) -> list[Path]:
    """Draw a finished calibration on its own images, see :func:`draw_groups`."""
    source = calibration.source
    return draw_groups(calibration.record(), source.network, source.forward, folder, layer)


def draw_groups(
    record: Record, network: nn.Module, forward: Callable[[], Any], folder: str | Path, layer: str | None = None
) -> list[Path]:
    """Draw the budget curve, if groups were allocated, and the channel ranges of one layer in one image.

    Args:
        record: Record of a calibration.
        network: Calibrated network.
        forward: Function that runs the network on images.
        folder: Folder of ``budget.png`` and ``channel_ranges.png``.
        layer: Name of a grouped layer; None takes the one whose groups differ most in width.

    Returns:
        Written files; empty if the scheme has no groups.

    Raises:
        ConfigurationError: Layer without groups.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, written = settings_of(record), []
    if curve := curve_of(record, INPUT):
        written.append(folder / "budget.png")
        chosen = settings["groups"] if settings["budget"] is None else None
        draw_budget_curve(curve, written[-1], "Groups of channels: perturbation and cost", chosen)
    grouped = _grouped(network)
    if not grouped:
        return written
    if layer is not None and layer not in grouped:
        raise ConfigurationError(f"layer={layer!r} has no groups: expected one of {', '.join(grouped)}.")
    name = layer or max(grouped, key=lambda candidate: _spread(grouped[candidate]))
    if _draw_layer(network.get_submodule(name), name, grouped[name], forward, folder / "channel_ranges.png"):
        written.append(folder / "channel_ranges.png")
    return written


def _grouped(network: nn.Module) -> dict[str, GroupQuantizer]:
    slots = {name: getattr(module, INPUT, None) for name, module in network.named_modules()}
    return {name: quantizer for name, quantizer in slots.items() if isinstance(quantizer, GroupQuantizer)}


def _spread(quantizer: GroupQuantizer) -> float:
    width = quantizer.centres[:, 1] - quantizer.centres[:, 0]
    return float(width.max() / width.clamp_min(1e-8).min()) if len(width) > 1 else 1.0


def _draw_layer(
    module: nn.Module, name: str, quantizer: GroupQuantizer, forward: Callable[[], Any], path: Path
) -> bool:
    """Draw the channels of a layer, and return whether the forward called it."""
    inputs: list[Tensor] = []

    def record_input(layer: nn.Module, args: tuple[Any, ...]) -> None:
        # At this point windowed attention has set the number of images of this call.
        inputs.append(quantizer.per_image(args[0].detach())[:1].float())

    handle = module.register_forward_pre_hook(record_input)
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    if not inputs:
        return False
    ranges, group = channel_ranges(inputs[0])[0], channel_groups(inputs[0], quantizer.centres)[0, 0]
    low = -quantizer.zero_point * quantizer.scale
    bounds = torch.stack([low, low + quantizer.scale * quantizer.grid.high], dim=1)
    title = f"Input of {name}, one image, {len(quantizer.centres)} groups"
    minima, maxima = (bound.cpu().numpy() for bound in ranges.unbind(dim=1))
    draw_channel_ranges(minima, maxima, group.cpu().numpy(), path, title, bounds.tolist())
    return True


@dataclass
class GroupSection(Section):
    """Section of IGQ-ViT: the groups of channels and their effect.

    Attributes:
        record: Record of the calibration.
    """

    record: Record

    @property
    def name(self) -> str:
        return "IGQ-ViT"

    @property
    def detail(self) -> str:
        scheme = settings_of(self.record).get("scheme")
        return f"Scheme '{scheme}'{', groups allocated' if groups_of(self.record) else ''}. " if scheme else ""

    @property
    def plan(self) -> str:
        return plan_of(self.record)

    def draw(self, folder: Path, network: nn.Module, forward: Callable[[], object]) -> dict[str, Path]:
        return (
            {TITLES[path.name]: path for path in draw_groups(self.record, network, forward, folder)}
            if is_finished(self.record)
            else {}
        )

    def figures(self) -> Mapping[str, Any]:
        return {"groups": groups_of(self.record), "perturbations": tables_of(self.record, OMEGA)}

    @property
    def settings(self) -> Settings:
        return settings_of(self.record)

    def remedy(self, cause: Cause, layer: LayerAnalysis) -> Remedy:
        return remedies.of_groups(cause, layer, self.settings)
