"""Pure tensor functions: the affine grid, rounding, ranges, products. Nothing here keeps state."""

from lightning_quant.functional.grid import (
    Grid,
    check_bits,
    decode,
    encode,
    fake_quantize,
    per_channel,
    split_groups,
    symmetric_grid,
    unsigned_grid,
)
from lightning_quant.functional.ranges import min_max, mse_search, percentile, scale_and_zero_point
from lightning_quant.functional.rounding import round_stochastic, rounding_noise

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
    "round_stochastic",
    "rounding_noise",
    "scale_and_zero_point",
    "split_groups",
    "symmetric_grid",
    "unsigned_grid",
]
