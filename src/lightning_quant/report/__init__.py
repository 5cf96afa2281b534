"""What happened in a run, as pictures."""

from lightning_quant.report.calibration import CalibrationPictures, draw_calibration
from lightning_quant.report.groups import draw_budget_curve, draw_channel_ranges
from lightning_quant.report.intervals import Curve, LayerMetrics, draw_intervals, read_layer_metrics

__all__ = [
    "CalibrationPictures",
    "Curve",
    "LayerMetrics",
    "draw_budget_curve",
    "draw_calibration",
    "draw_channel_ranges",
    "draw_intervals",
    "read_layer_metrics",
]
