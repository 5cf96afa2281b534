"""What happened in a run, as pictures."""

from lightning_quant.report.groups import draw_budget_curve, draw_channel_ranges
from lightning_quant.report.intervals import Curve, LayerMetrics, draw_intervals, read_layer_metrics

__all__ = [
    "Curve",
    "LayerMetrics",
    "draw_budget_curve",
    "draw_channel_ranges",
    "draw_intervals",
    "read_layer_metrics",
]
