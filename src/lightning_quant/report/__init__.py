"""What happened in a run, as pictures."""

from lightning_quant.report.intervals import Curve, LayerMetrics, draw_intervals, read_layer_metrics

__all__ = ["Curve", "LayerMetrics", "draw_intervals", "read_layer_metrics"]
