"""Settings of a calibration, checked before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_quant.calibration.settings import CalibrationSettings
from lightning_quant.errors import ConfigurationError
from lightning_quant.functional.grid import check_bits

Scheme = Literal["igq", "layer_wise", "per_token", "repq", "upper_bound"]
GroupRanges = Literal["mean", "envelope", "searched"]
LayerRange = Literal["percentile", "min_max"]


@dataclass(frozen=True)
class Settings(CalibrationSettings):
    """Arguments of :class:`lightning_quant.IGQViT` that determine what the quantized network computes.

    Raises:
        ConfigurationError: Argument out of range.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    groups: int = 8
    softmax_groups: int | None = None
    allocate: bool = True
    budget: float | None = None
    calibration_images: int = 32
    literal_zero_point: bool = False
    scheme: Scheme = "igq"
    group_ranges: GroupRanges = "searched"
    layer_range: LayerRange = "percentile"
    sequential: bool = True
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.activation_bits, "activation_bits")
        for name in ("groups", "softmax_groups", "calibration_images"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name}={value!r}: expected a whole number of at least 1.")
        if self.budget is not None and not self.allocates:
            raise ConfigurationError(
                f"budget={self.budget} is distributed over layers: write allocate=True and scheme='igq' too."
            )
        self.check_choices(scheme=Scheme, group_ranges=GroupRanges, layer_range=LayerRange)

    @property
    def row_groups(self) -> int:
        """Number of groups of the rows of a softmax."""
        return self.groups if self.softmax_groups is None else self.softmax_groups

    @property
    def allocates(self) -> bool:
        """Whether the number of groups is chosen for each layer; only scheme "igq" has groups."""
        return self.allocate and self.scheme == "igq"
