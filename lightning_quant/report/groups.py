"""What groups gain: the budget curve of an allocation, and the ranges of channels before and after grouping."""

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
    "budget.png": "Perturbation over bit operations, same groups everywhere and allocated",
    "channel_ranges.png": "Channel ranges of one layer, before grouping and after",
}


class CalibrationPictures(pl.Callback):
    """Draw ``budget.png`` and ``channel_ranges.png`` when a run with IGQViT or IGQViTModule ends.

    Args:
        folder: where to.
        layer: whose channels are drawn; None takes the one whose groups differ most in width.

    Example:
        >>> from lightning_quant import IGQViT
        >>> callbacks = [IGQViT(4, 4), CalibrationPictures("pictures")]
        >>> trainer = pl.Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(self, folder: str | Path, layer: str | None = None) -> None:
        self.folder, self.layer = user_path(folder), layer

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written to."""
        if stage in ("fit", "test"):
            check_on_first_rank(trainer, partial(check_writable, self.folder))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw after a module's calibration."""
        self._draw(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw after a callback's calibration."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        holders: list[object] = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        calibrating = [each for each in holders if isinstance(each, CalibratingModule | CalibratingCallback)]
        found = [each.calibration for each in calibrating if isinstance(each.calibration, Calibration)]
        if found and found[0].finished and trainer.is_global_zero:
            written = draw_calibration(found[0], self.folder, self.layer)
            rank_zero_info(f"Pictures of the calibration: {', '.join(map(str, written))}")
        elif not found and is_calibrated(pl_module):
            rank_zero_warn(
                "CalibrationPictures drew nothing: the network was calibrated in an earlier run. QuantizationReport"
                " draws it from a checkpoint too."
            )


def draw_calibration(calibration: Calibration, folder: str | Path, layer: str | None = None) -> list[Path]:
    """:func:`draw_groups` of a calibration that is finished, and of its images."""
    source = calibration.source
    return draw_groups(calibration.record(), source.network, source.forward, folder, layer)


def draw_groups(
    record: Record, network: nn.Module, forward: Callable[[], Any], folder: str | Path, layer: str | None = None
) -> list[Path]:
    """Draw the budget curve, where groups were allocated, and the ranges of one layer's channels in one image.

    Args:
        record: of a calibration.
        network: that was calibrated.
        forward: calls it with images.
        folder: for ``budget.png`` and ``channel_ranges.png``.
        layer: name of a grouped layer; None takes the one whose groups differ most in width.

    Returns:
        what was written; nothing where the scheme has no groups.

    Raises:
        ConfigurationError: a layer that has no groups.
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
    name = layer or max(grouped, key=lambda each: _spread(grouped[each]))
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
    """Whether the forward came to the layer."""
    seen: list[Tensor] = []

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        # Here and not later: windowed attention has told the quantizer how many images this call has.
        seen.append(quantizer.per_image(args[0].detach())[:1].float())

    handle = module.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    if not seen:
        return False
    ranges, group = channel_ranges(seen[0])[0], channel_groups(seen[0], quantizer.centres)[0, 0]
    low = -quantizer.zero_point * quantizer.scale
    bounds = torch.stack([low, low + quantizer.scale * quantizer.grid.high], dim=1)
    title = f"Input of {name}, one image, {len(quantizer.centres)} groups"
    least, most = (bound.cpu().numpy() for bound in ranges.unbind(dim=1))
    draw_channel_ranges(least, most, group.cpu().numpy(), path, title, bounds.tolist())
    return True


@dataclass
class GroupSection(Section):
    """IGQ-ViT: the groups of channels and what they gain.

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
