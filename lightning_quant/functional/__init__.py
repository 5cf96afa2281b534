"""Pure tensor functions without state: the affine grid, rounding, ranges and products."""

from lightning_quant.functional.grid import (
    Grid,
    check_bits,
    decode,
    encode,
    fake_quantize,
    per_channel,
    symmetric_grid,
    unsigned_grid,
)
from lightning_quant.functional.ranges import min_max, mse_search, percentile, scale_and_zero_point
from lightning_quant.functional.rounding import rounding_noise

__all__ = [
    "Grid",
    "check_bits",
    "decode",
    "encode",
    "fake_quantize",
    "min_max",
    "mse_search",
    "per_channel",
    "percentile",
    "rounding_noise",
    "scale_and_zero_point",
    "symmetric_grid",
    "unsigned_grid",
]
