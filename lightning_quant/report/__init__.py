"""The report of a run: pictures, figures and advice on a page and in JSON."""

from lightning_quant.report.analyzing import analyze
from lightning_quant.report.error_curves import draw_error_curves
from lightning_quant.report.group_charts import draw_budget_curve, draw_channel_ranges
from lightning_quant.report.groups import CalibrationPictures, draw_calibration
from lightning_quant.report.html import RunReport, with_float, write_report
from lightning_quant.report.image_grids import draw_image_pairs
from lightning_quant.report.intervals import Curve, LayerMetrics, draw_intervals, read_layer_metrics
from lightning_quant.report.quantization_report import QuantizationReport
from lightning_quant.report.trajectories import GenerationPictures, draw_generation
from lightning_quant.report.windows import draw_window_sweep

__all__ = [
    "CalibrationPictures",
    "Curve",
    "GenerationPictures",
    "LayerMetrics",
    "QuantizationReport",
    "RunReport",
    "analyze",
    "draw_budget_curve",
    "draw_calibration",
    "draw_channel_ranges",
    "draw_error_curves",
    "draw_generation",
    "draw_image_pairs",
    "draw_intervals",
    "draw_window_sweep",
    "read_layer_metrics",
    "with_float",
    "write_report",
]
